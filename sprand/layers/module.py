"""Sparse modules: a module keeps its class (as a subclass), its weights and its names, and its forward trains entries of them.

What a forward does with entries depends on the kind of the module, and stands here. Where the entries are kept is another
matter: on the module itself (`attached`), or in the layer of PEFT around it (`sprand.peft.hosted`).
"""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional, reads, sharding
from .entries import Entries, write_all
from .sites import Site, is_conv1d

_live: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Running(threading.local):
    """What attribute access gives a thread while the forward of a module runs in it.

    Attributes:
        aliases: by `id` of the module, tensors by the parameter they stand for.
    """

    def __init__(self) -> None:
        self.aliases: dict[int, dict[str, Tensor]] = {}


_running = _Running()


class SparseModule(nn.Module):
    """A module whose forward trains entries of its parameters; works for any that reads its parameters by attribute.

    A subclass says where the entries are kept. `sparse_class` mixes it into the class of a module.
    """

    _sprand_class: type[nn.Module]  # the module's own class
    _sprand_keeper: type[SparseModule]  # the subclass that keeps the entries
    _sprand_targets: Mapping[str, Any]  # by the name of a parameter, what is kept of it beside its tensors
    _sprand_active: bool
    _is_sampled = False  # whether the gradient of `weight` is a product of which entries are sampled

    def sparse_entries(self, parameter: str = "weight") -> Entries:
        """The trained entries of one targeted parameter."""
        raise NotImplementedError

    def sparse_sites(self, prefix: str) -> Iterator[Site]:
        """The weights with trained entries, by their names in a model that calls this module `prefix`."""
        raise NotImplementedError

    def sparse_deltas(self) -> Iterator[tuple[nn.Parameter, str]]:
        """Every delta that trains, with the name of the targeted parameter."""
        raise NotImplementedError

    def sparse_target(self, parameter: str) -> Any:
        """What is kept of one targeted parameter beside its tensors."""
        return self._sprand_targets[parameter]

    @property
    def sparse_active(self) -> bool:
        """Whether the trained entries are in effect; without them the module is its base."""
        return self._sprand_active

    @property
    def plain_class(self) -> type[nn.Module]:
        """The module's own class, without what trains entries."""
        return self._sprand_class

    def write_weights(self) -> None:
        """Make every targeted parameter hold its trained values now (its base values while disabled)."""
        write_parameters([(self, parameter, self._sprand_active) for parameter in self._sprand_targets])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, SparseModule):  # merged since another tool took this forward from it
            return type(self).forward(self, *args, **kwargs)
        if not self._sprand_active:
            self.write_weights()
            return super().forward(*args, **kwargs)
        outer = _running.aliases
        _running.aliases = outer | {id(self): self._aliases()}
        views = {name: self.__dict__.pop(name) for name in self._sprand_targets if name in self.__dict__}  # of FSDP1
        try:
            output = super().forward(*args, **kwargs)
        finally:
            _running.aliases = outer
            self.__dict__.update(views)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._write_in_backward(output)
        return output

    def __getattr__(self, name: str) -> Any:
        """A targeted parameter as its reader must see it; while the forward runs, each thread reads an alias of its own."""
        aliases = _running.aliases.get(id(self))
        if aliases is not None and name in aliases:
            return aliases[name]
        value = super().__getattr__(name)
        return self._as_read(name) if self._sprand_active and name in self._sprand_targets else value

    def _as_read(self, parameter: str) -> Tensor:
        """A targeted parameter for code that reads it past the forward: an alias, or written, where it is to be used.

        Other code gets the parameter itself, which may be tied, replaced, moved or printed.
        """
        weight = self._parameters[parameter]
        if sharding.is_sharded(weight) or weight.is_meta or reads.is_to_be_moved():
            return weight
        if not reads.is_to_be_used():
            name = self._name_of(parameter)
            reads.refuse_merge(name)
            reads.tell_of_lost_gradient(name, self.sparse_entries(parameter).written)
        elif torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._alias(parameter, copy=sharding.is_gathered(self) or sharding.is_of_zero3(weight))
        else:
            self.sparse_entries(parameter).ensure(weight)
        return weight

    def _name_of(self, parameter: str) -> str:
        """The name of a targeted parameter in the model, as far as it is known here."""
        return getattr(self.sparse_target(parameter), "name", parameter)

    def _aliases(self) -> dict[str, Any]:
        """What the forward reads instead of the module's own attributes."""
        return {name: self._alias(name) for name in self._sprand_targets}

    def _write_in_backward(self, output: Any) -> None:
        """Where weights are gathered anew for backward, have them written there too."""
        gathered = sharding.is_gathered(self)
        for name in self._sprand_targets:
            weight = self._parameters[name]
            if gathered or sharding.is_of_zero3(weight):
                functional.written_in_backward(output, weight, self.sparse_entries(name))

    def _alias(self, parameter: str, copy: bool = False) -> Tensor:
        """A targeted parameter as the forward must see it; a copy where nothing writes entries again before backward."""
        # a compiled backward reads the memory that forward read
        copy = copy or (torch.compiler.is_compiling() and sharding.is_gathered(self))
        return functional.alias(self._weight(parameter), self.sparse_entries(parameter), copy)

    def _weight(self, parameter: str) -> Tensor:
        """A targeted parameter itself.

        Raises:
            ValueError: Another tool has taken it away since its entries train.
        """
        weight = self._parameters.get(parameter)
        if weight is None:
            name = self._name_of(parameter)
            raise ValueError(
                f"{name} has entries that train, and another tool has put other parameters in its place (prune, weight_norm and "
                "parametrizations do); give the model to such a tool first, and to sprand then, with target_parameters= for what "
                "the tool made"
            )
        return weight

    def _replicate_for_data_parallel(self) -> nn.Module:
        """What `nn.DataParallel` takes to each GPU for one forward.

        Raises:
            ValueError: Candidates for a new mask are looked for, of which each replica would see its own rows only.
        """
        entries = {name: self.sparse_entries(name) for name in self._sprand_targets}
        if any(own.candidates is not None for own in entries.values()):
            raise ValueError(
                "DynamicMask: it does not see whole gradients under torch.nn.DataParallel; use DistributedDataParallel (torchrun "
                "or accelerate launch starts a process for each GPU), or let one GPU be visible by CUDA_VISIBLE_DEVICES=0"
            )
        replica = super()._replicate_for_data_parallel()
        state = {"_sprand_targets": entries, "_sprand_active": self._sprand_active, "_sprand_held": frozenset(self._parameters)}
        replica.__dict__.update(state)
        replica.__class__ = sparse_class(_Replica, self.plain_class)
        return replica

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        track(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_sparse_module, (self._sprand_keeper, self._sprand_class), self.__getstate__()


class _SparseLinear(SparseModule):
    """A linear layer: the gradient of the chosen entries is sampled, no dense gradient exists."""

    _is_sampled = True
    _transposed = False

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, SparseModule):
            return type(self).forward(self, input)
        targets = self._sprand_targets if self._sprand_active else ()
        if "weight" not in targets:
            return super().forward(input)
        weight, bias = self._weight("weight"), self._parameters["bias"]
        if "bias" in targets:
            bias = self._alias("bias")
        return functional.linear(input, weight, bias, self.sparse_entries(), self._transposed)


class _SparseConv1D(_SparseLinear):
    """Hugging Face's `Conv1D`, a linear layer whose weight is stored transposed."""

    _transposed = True


class _SparseRecurrent(SparseModule):
    """A `torch.nn.RNNBase`, which reads its parameters from a list beside them."""

    @property
    def _flat_weights(self) -> list[Tensor]:
        return _running.aliases.get(id(self), self.__dict__)["_flat_weights"]

    @_flat_weights.setter
    def _flat_weights(self, flat: list[Tensor]) -> None:
        self.__dict__["_flat_weights"] = flat

    def _aliases(self) -> dict[str, Any]:
        aliases = super()._aliases()
        aliases["_flat_weights"] = [aliases.get(name, self._parameters.get(name)) for name in self._flat_weights_names]
        return aliases

    def _weights_have_changed(self) -> bool:
        """Whether a parameter was replaced, for which an alias is no reason."""
        own = zip(self._flat_weight_refs, self._flat_weights_names, strict=True)
        return any(ref is not None and ref() is not self._parameters.get(name) for ref, name in own)


class _SparseEmbedding(SparseModule):
    """An embedding: the gradient of the chosen entries walks the tokens, no gradient of the vocabulary exists.

    With `max_norm`, rows are scaled as they are looked up, so that the weight keeps its base.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, SparseModule):
            return type(self).forward(self, input)
        weight = self._weight("weight")
        options = self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq
        if self._sprand_active:
            return functional.embedding(input, weight, self.sparse_entries(), *options)
        if self.max_norm is None:
            return super().forward(input)
        self.write_weights()
        return functional.Lookup(*options)(input, weight)


class _Replica(SparseModule):
    """A copy of a sparse module that `nn.DataParallel` makes for one forward: it uses the entries of the original."""

    _sprand_targets: Mapping[str, Entries]
    _sprand_held: frozenset[str]  # the names of the original's parameters

    def sparse_entries(self, parameter: str = "weight") -> Entries:
        return self._sprand_targets[parameter].on(self._parameters[parameter].device)

    def __setattr__(self, name: str, value: Any) -> None:
        """PyTorch gives a replica plain attributes for parameters; they are where any sparse module looks for its own."""
        super().__setattr__(name, value)
        if name in self._sprand_held and name in self.__dict__:
            self._parameters[name] = self.__dict__.pop(name)


def _kind_of(cls: type[nn.Module]) -> type[SparseModule]:
    """What to mix into a module class, by how it uses its weight."""
    if cls.forward is nn.Linear.forward:
        return _SparseLinear
    if cls.forward is nn.Embedding.forward:
        return _SparseEmbedding
    if is_conv1d(cls):
        return _SparseConv1D
    if issubclass(cls, nn.RNNBase):
        return _SparseRecurrent
    return SparseModule


def is_transposed(cls: type[nn.Module]) -> bool | None:
    """Whether a linear layer of this class keeps its weight as `[in, out]`; None where it is no linear layer."""
    kind = _kind_of(cls)
    return kind._transposed if issubclass(kind, _SparseLinear) else None


@functools.cache
def sparse_class(keeper: type[SparseModule], cls: type[nn.Module]) -> type[SparseModule]:
    """The subclass of `cls` that trains entries kept by `keeper`: of `Linear` it is called `SparseLinear`."""
    own = {"_sprand_keeper": keeper, "_sprand_class": cls, "__module__": __name__}
    return type(f"Sparse{cls.__name__}", (keeper, _kind_of(cls), cls), own)


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, and so its forward where another tool keeps it on the module (accelerate's hooks do)."""
    before = type(module).forward
    module.__class__ = cls
    for name, value in module.__dict__.items():
        if isinstance(value, types.MethodType) and value.__self__ is module and value.__func__ is before:
            module.__dict__[name] = types.MethodType(cls.forward, module)


def _new_sparse_module(keeper: type[SparseModule], cls: type[nn.Module]) -> SparseModule:
    sparse = sparse_class(keeper, cls)
    return sparse.__new__(sparse)


def write_parameters(items: Sequence[tuple[SparseModule, str, bool]]) -> None:
    """Write parameters, given as `(module, name, trained)`: their trained values or, bit for bit, their base.

    One call of an operator for all parameters of a device; a parameter of several modules is written by each, in their order.
    Of a DTensor each rank writes its part; what ZeRO-3 has put away is left alone, it is written where it is used.
    """
    calls: dict[tuple[int, torch.device, bool], list[_Write]] = {}
    met: Counter[int] = Counter()
    for module, name, trained in items:
        write = _Write(module._parameters[name], module.sparse_entries(name), trained)
        if not write.is_plain:
            write.alone()
            continue
        turn = met[id(write.weight)]
        met[id(write.weight)] += 1
        calls.setdefault((turn, write.weight.device, trained), []).append(write)
    for (_, _, trained), writes in sorted(calls.items(), key=lambda call: call[0][0]):
        write_all([write.weight for write in writes], [write.entries for write in writes], trained)


class _Write(NamedTuple):
    """One parameter that is to hold its trained values or, bit for bit, its base."""

    weight: Tensor
    entries: Entries
    trained: bool

    @property
    def is_plain(self) -> bool:
        """Whether it can be written by one call together with others."""
        tensors = self.weight.data, self.entries.delta.data
        at_hand = not self.is_put_away and all(type(tensor) is Tensor for tensor in tensors)
        return at_hand and self.weight.dtype == self.entries.base.dtype

    @property
    def is_put_away(self) -> bool:
        """Whether the weight is written where it is used alone: ZeRO-3, FSDP1 and accelerate's offload bring it there."""
        return self.weight.is_meta or sharding.is_partition(self.weight) or sharding.is_of_fsdp1(self.weight)

    def alone(self) -> None:
        """Write it by a call of its own, or as much of it as this rank holds."""
        weight, entries = self.weight, self.entries
        if self.is_put_away:
            return
        if sharding.is_dtensor(weight):
            delta = sharding.whole(entries.delta) if self.trained else None
            sharding.patch_(weight, entries.indices, entries.base, delta, entries.scale)
        elif self.trained:
            entries.write(weight)
        else:
            entries.restore(weight)


def targets_by_delta() -> dict[int, tuple[SparseModule, str]]:
    """Every live delta parameter by its `id`, with the module and parameter it belongs to."""
    return {id(delta): (module, name) for module in _live for delta, name in module.sparse_deltas()}


def sparse_modules(model: nn.Module) -> Iterator[tuple[str, SparseModule]]:
    """The modules that hold trained entries, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseModule))


def track(module: nn.Module) -> None:
    """Let `targets_by_delta` find a module that `attach` did not make; it has `sparse_deltas`."""
    _live.add(module)


def untrack(module: nn.Module) -> None:
    """The inverse of `track`."""
    _live.discard(module)
