"""The PEFT tuner: puts `SprandLayer`s into a base model, saves and loads their adapters, and adds up several of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import get_quantization_kwargs
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..adapters import first_forward
from ..adapters.first_steps import Scoring
from ..kernels import native
from ..kernels.dtypes import HALVES
from ..layers import sharding, untargeted
from ..layers.first_backward import watch
from ..selection.mask import selection_of
from .config import SprandConfig
from .hosted import refuse_applied
from .layer import SprandLayer, adapter_targets, layer_class
from .loading import check_loadable
from .mixed import rows_use
from .plan import Plan, as_of_apply, make_plan
from .quantized import QuantizedLayer
from .tensors import put_back, taken_out
from .undoing import take_back, whole_or_not_at_all
from .unsaved import remember, warn_of_buffers
from .weighted_adapters import combined, rule_of

ELSEWHERE = (
    "save the adapter by model.save_pretrained(path, is_main_process=rank == 0) on every rank (under FSDP1 with "
    "state_dict=wrapper.state_dict()), and load it into a model that is not sharded"
)


class SprandModel(BaseTuner):
    """What `get_peft_model(model, SprandConfig(...))` puts around a model."""

    prefix = "sprand_"
    tuner_layer_cls = SprandLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter. Everything is proven before the model is touched.

        Raises:
            ValueError: Nothing matches, the counts do not fit, the model is not the one the adapter was trained on, it trains
                entries of `sprand.apply`, or it is sharded already; one that `deepspeed.zero.Init` made in parts may be, and
                every rank calls this.
        """
        native.warn_if_slow()
        if sharding.kind_of(model) != "zero3" or _has_engine(model):
            sharding.refuse(model, "get_peft_model", "add and load all adapters first, then shard the model")
        refuse_applied(model, "get_peft_model")
        _check_name(adapter_name)
        given = self.peft_config[adapter_name]
        given.base_model_name_or_path = model.__dict__.get("name_or_path") or given.base_model_name_or_path
        config = copy.deepcopy(given)  # in which targets are named in full
        if config.targets is not None:
            check_loadable(config, model, adapter_name)
        plan: dict[int, Plan] = {}  # by the identity of the module that holds the weights
        for site, indices in make_plan(model, config, adapter_name, get_quantization_kwargs(model)):
            plan.setdefault(id(site.module), []).append((site, indices))
        keys = _keys_of(model, plan)
        out_of_reach = [own[0][0].name for module, own in plan.items() if module not in keys.values()]
        if out_of_reach:
            config.target_parameters = sorted({*(config.target_parameters or ()), *out_of_reach})
        self.__dict__.update(_plan=plan, _planned=keys.keys(), _low_cpu_mem_usage=low_cpu_mem_usage)
        if given.targets is not None or given.indices is not None:  # which say what is targeted, whatever the names are
            given.target_modules = list(config.target_modules)
        self.peft_config[adapter_name] = config
        try:
            with whole_or_not_at_all(model, adapter_name) as flags:
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, False, None)
                self.__dict__.setdefault("_flags", flags)
        finally:
            self.peft_config[adapter_name] = given
            del self.__dict__["_plan"], self.__dict__["_planned"], self.__dict__["_low_cpu_mem_usage"]
        watch(model)
        untargeted.follow(model)
        if config.waits:
            given.saved["selection"] = selection_of(as_of_apply(config))
            scoring = Scoring()
            for module in (self, model):  # PEFT calls the forward of the model itself, and others call the model alone
                first_forward.watch(module, scoring)
        remember(self)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
        seed: int = 0,
    ) -> None:
        """Make a new adapter from several: its entries are the union of theirs.

        Args:
            adapters: names of adapters of this model.
            weights: one factor for each.
            adapter_name: name of the new one.
            combination_type: `"linear"`: the weighted sum; `"ties"` (arXiv 2306.01708): of each adapter the largest changes
                are kept, at each entry the sign with more weight wins, and the mean of the changes of that sign is taken;
                `"dare_linear"` (arXiv 2311.03099): random changes of each are kept, divided by `density`, and summed.
            density: for ties and dare: fraction of each adapter's changes that is kept, in (0, 1].
            majority_sign_method: for ties: `"total"` elects signs by the sums of changes, `"frequency"` by their numbers.
            seed: for dare: of the draw, which is the same on every machine.

        Raises:
            ValueError: An adapter is unknown, the name is taken, or an option does not fit.
        """
        rule = rule_of(combination_type, density, majority_sign_method, seed)
        config, values = combined(self, adapters, weights, adapter_name, rule)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for _, _, _, target in adapter_targets(self.model, adapter_name):
            target.deltas[adapter_name].data.copy_(values[target.name])

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT, and exact: `unmerge_adapter` gives the base back bit for bit.

        Raises:
            ValueError: The model is sharded, or quantized, an adapter is unknown, or `safe_merge` finds an entry that is not
                finite. Nothing has changed then.
        """
        sharding.refuse(self.model, "merge_adapter", ELSEWHERE)
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        untargeted.follow(self.model)

    def unmerge_adapter(self) -> None:
        """Put the base back.

        Raises:
            ValueError: The model is sharded.
        """
        sharding.refuse(self.model, "unmerge_adapter", ELSEWHERE)
        super().unmerge_adapter()
        untargeted.follow(self.model)

    def enable_adapter_layers(self) -> None:
        """Use the adapters again."""
        super().enable_adapter_layers()
        untargeted.follow(self.model)

    def disable_adapter_layers(self) -> None:
        """Use the base alone, bit for bit.

        Raises:
            ValueError: The model is sharded, and has merged adapters, which cannot be taken out of it, or FSDP1 shards it.
        """
        if any(layer.merged for layer in self._layers()):
            sharding.refuse(self.model, "disable_adapter", "unmerge the adapters before the model is sharded")
        self._refuse_fsdp1("disable_adapter")
        super().disable_adapter_layers()
        untargeted.follow(self.model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make other adapters the active ones, as in PEFT.

        Raises:
            ValueError: FSDP1 shards the model, and others are active.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if names != list(self.active_adapters):
            self._refuse_fsdp1("set_adapter")
        super().set_adapter(adapter_name, inference_mode)
        untargeted.follow(self.model)

    def _refuse_fsdp1(self, what: str) -> None:
        """Weights that FSDP1 has gathered and keeps may hold the entries of the last forward."""
        if sharding.kind_of(self.model) == "fsdp1":
            sharding.refuse(self.model, what, "use fully_shard (FSDP2), under which adapters can be switched and disabled")

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as in PEFT; one that is active leaves its weights first.

        Raises:
            ValueError: No adapter has that name, or the model is sharded.
        """
        sharding.refuse(self.model, "delete_adapter", ELSEWHERE)
        super().delete_adapter(adapter_name)
        untargeted.follow(self.model)

    def _layers(self) -> list[SprandLayer]:
        """The layers that hold adapters, in the order of the model."""
        return [module for module in self.model.modules() if isinstance(module, SprandLayer)]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Indices and base are alike on every rank: DistributedDataParallel need not broadcast them."""
        names = [name for name, _ in self.named_buffers() if re.search(r"\.sprand_(indices|base)[^.]*\.[^.]+$", name)]
        return [f"base_model.{name}" for name in names]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:
        """Whether a module gets an adapter. While one is added, its plan says so, which follows PEFT's rules for modules."""
        by_name, planned = check_target_module_exists(peft_config, key), self.__dict__.get("_planned")
        if planned is None:
            return by_name
        if key in planned:
            return True
        return False if by_name else by_name  # PEFT tells what is left out from what does not match

    def _create_and_replace(
        self,
        config: SprandConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        own = self._plan.pop(id(base), None)
        if own is None:
            return
        layer = target
        if not isinstance(target, SprandLayer):
            layer = (layer_class(base) if own[0][0].backend is None else QuantizedLayer)(target)
            layer.train(target.training)
            self._replace_module(parent, target_name, layer, target)
        layer.set_adapter(self.active_adapters)
        for site, indices in own:
            layer.sprand_add(site, indices, adapter_name, config, self._low_cpu_mem_usage)

    def _inject_parameters(
        self, peft_config: PeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Weights in modules that PEFT's walk does not come to, since they are inside of a layer of PEFT."""
        places = {id(module): name for name, module in model.named_modules()}
        for key in list(self._plan):
            site = self._plan[key][0][0]
            name = places[id(site.module)]
            outer = name.removesuffix(".base_layer") if not name.endswith(site.module_name) else name
            parent, _, last = outer.rpartition(".")
            owner = model.get_submodule(parent)
            self._create_and_replace(peft_config, adapter_name, getattr(owner, last), last, owner, current_key=outer)
        return list(peft_config.target_parameters)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """Nothing to warn of: a weight that several modules share has one delta, which all of them train."""

    def _check_merge_allowed(self) -> None:
        """Tied weights merge like any other; a quantized layer refuses before any layer is merged."""
        for layer in self._layers():
            if isinstance(layer, QuantizedLayer):
                layer.merge()

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        self._check_merge_allowed()
        are_known = isinstance(adapter_names, (list, tuple)) and set(adapter_names) <= self.peft_config.keys()
        if adapter_names is not None and not (adapter_names and are_known):
            known = ", ".join(self.peft_config)
            raise ValueError(f"adapter_names: expected a list of names among {known}, got {adapter_names!r}")
        for layer in self._layers() if safe_merge else ():
            layer.sprand_check_finite(layer.active_adapters if adapter_names is None else adapter_names)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT upcasts every tensor of a new adapter; a base keeps the dtype of its weight, and so does a delta if asked to."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self._layers():
            for _, weight, target in layer.sprand_weights():
                if weight is None:
                    continue
                target.cast_base(weight)
                if not autocast_adapter_dtype and weight.dtype in HALVES and adapter_name in target.deltas:
                    delta = target.deltas[adapter_name]
                    delta.data = delta.data.to(weight.dtype)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Inside of the block rows of a batch use the adapters that `adapter_names` gives, one for each.

        Raises:
            ValueError: An adapter is unknown or merged, or changes more than whole columns of linear layers, or the model is in
                training mode.
        """
        names = kwargs.get("adapter_names")
        return nullcontext() if names is None else rows_use(self.model, self.peft_config, names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        sharding.refuse(self.model, "unload", ELSEWHERE)
        layers = self._layers()
        if merge:
            self._check_merge(adapter_names, safe_merge)
        if adapter_names is not None:  # PEFT keeps modules trained in full as the active adapter has them
            self.set_adapter(adapter_names)
        elif not merge and not any(layer.merged for layer in layers):
            for module in self.model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.set_adapter([])
        for parent, name, layer in self._inner_layers():
            if merge:
                layer.merge(safe_merge, adapter_names)
            self._replace_module(parent, name, layer.get_base_layer(), layer)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for layer in layers:
            layer.sprand_leave()
        untargeted.follow(model)
        return model

    def _inner_layers(self) -> Iterator[tuple[nn.Module, str, SprandLayer]]:
        """Layers inside of another one, which PEFT's walk does not come to, from the inside out: parent, name, layer."""
        named = {name: module for name, module in self.model.named_modules() if isinstance(module, SprandLayer)}
        for name in reversed(named):
            if any(name.startswith(f"{outer}.") for outer in named):
                parent, _, last = name.rpartition(".")
                yield self.model.get_submodule(parent), last, named[name]

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        for tuner in (module for module in model.modules() if isinstance(module, cls)):
            warn_of_buffers(tuner)
        return taken_out(model, config, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        try:
            return put_back(model, config, adapter_name, state_dict, cls._remove_adapter_name_from_key)
        except ValueError:
            take_back(model, adapter_name)
            raise


def _keys_of(model: nn.Module, plan: Container[int]) -> dict[str, int]:
    """The modules of a plan that PEFT's walk comes to, by name: it does not enter a layer of PEFT."""
    keys: dict[str, int] = {}
    layer = None
    for key, module in model.named_modules():
        if layer is not None and key.startswith(f"{layer}."):
            continue
        base = module
        if isinstance(module, BaseTunerLayer):
            layer, base = key, module.get_base_layer()
        if id(base) in plan:
            keys[key] = id(base)
    return keys


def _has_engine(model: nn.Module) -> bool:
    return any(type(module._parameters).__name__ == "ZeROOrderedDict" for module in model.modules())


def _check_name(name: str) -> None:
    if not name or "." in name or hasattr(nn.ParameterDict(), name):
        raise ValueError(
            f"adapter name: {name!r} cannot be used, since it becomes the name of a parameter; choose one without a dot that is "
            "no method of torch.nn.Module, for example 'default'"
        )
