"""Changes of whole columns as LoRA: `lora_B` holds the columns, and each row of a one-hot `lora_A` chooses an input."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..adapters.file import AdapterFile
from ..adapters.layout import PREFIX
from ..checkpoint.edits import Edits
from ..checkpoint.export import form
from ..checkpoint.shards import Checkpoint
from ..kernels.dtypes import dtype_name
from ..layers.sites import Site
from ..layers.units import Units
from .changes import Change, Sites
from .formats import BaseModel, changes_of_files, fields_of, heads_of, write_folder

LINEAR, TRANSPOSED, EMBEDDING, CONVOLUTION = "linear", "transposed", "embedding", "convolution"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
DTYPES = (torch.float32, torch.bfloat16)
NO_FACTORS = (
    "is no weight of a linear layer, an embedding, or a convolution without groups, dilation and padding of another kind than "
    "zeros, and PEFT's LoRA holds no other exactly; merge the adapter into its base instead"
)


def kind_of(site: Site) -> str | None:
    """How PEFT's LoRA takes a weight: one of the kinds above; None where it does not, or not exactly."""
    module = site.module
    if site.parameter != "weight" or isinstance(module, NonDynamicallyQuantizableLinear):  # PEFT would take it as attention
        return None
    if site.backend is not None or isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, Conv1D):
        return TRANSPOSED
    if isinstance(module, nn.Embedding):
        return EMBEDDING if module.max_norm is None else None
    return CONVOLUTION if type(module) in CONVOLUTIONS and _is_plain(module) else None


def columns_of(site: Site) -> Units:
    """A weight that LoRA takes as a matrix, whose columns are what the rows of `lora_A` choose."""
    axis = 0 if kind_of(site) == TRANSPOSED else 1
    return Units.of((site.shape[0], math.prod(site.shape[1:])), axis)


@dataclass(frozen=True, eq=False)
class Factors:
    """The change of one weight as PEFT's LoRA has it.

    Attributes:
        site: the weight.
        chosen: `[c]`, the inputs whose columns changed, ascending.
        deltas: `[out, c]`, the changes of these columns.
    """

    site: Site
    chosen: Tensor
    deltas: Tensor

    @classmethod
    def of(cls, change: Change, site: Site) -> Factors:
        """The factors of a change.

        Raises:
            ValueError: The changed entries are no whole columns, or LoRA cannot hold that weight.
        """
        kind = kind_of(site)
        if kind is None:
            raise ValueError(f"{change.name} {NO_FACTORS}")
        if len(site.owners) > 1:
            raise ValueError(
                f"{change.name}: several modules share this weight, and a LoRA changes what one of them computes; merge the "
                "adapter into its base instead"
            )
        units = columns_of(site)
        chosen = units.whole(change.indices)
        if chosen is None:
            raise ValueError(
                f"{change.name}: its trained entries are no whole columns, and a change of single entries has full rank in "
                'general, which no LoRA of as many values holds; train with layout="columns", or merge the adapter into its base '
                "instead"
            )
        deltas = change.values.view(chosen.numel(), -1).t() if kind == TRANSPOSED else change.values.view(units.outer, -1)
        return cls(site, chosen, deltas)

    @property
    def rank(self) -> int:
        """How many columns changed."""
        return self.chosen.numel()

    def tensors(self, name: str, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Both factors by their keys in a file of PEFT.

        Args:
            name: of the module in the base model.
            rank: of the factors; zeros fill what is above their own.
            dtype: of both.
        """
        kind, shape, device = kind_of(self.site), self.site.shape, self.deltas.device
        a = torch.zeros(rank, columns_of(self.site).count, dtype=dtype, device=device)
        b = torch.zeros(len(self.deltas), rank, dtype=dtype, device=device)
        a[torch.arange(self.rank, device=device), self.chosen.long()] = 1
        b[:, : self.rank] = self.deltas
        prefix = f"{PREFIX}{name}.lora_"
        if kind == EMBEDDING:  # PEFT multiplies them the other way round
            return {f"{prefix}embedding_A": b.t().contiguous(), f"{prefix}embedding_B": a.t().contiguous()}
        if kind == CONVOLUTION:
            a, b = a.view(rank, *shape[1:]), b.view(*b.shape, *[1] * len(shape[2:]))
        return {f"{prefix}A.weight": a, f"{prefix}B.weight": b}


def write_lora(
    folder: Path,
    changes: Iterable[Change],
    sites: Sites,
    heads: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    one_rank: bool = False,
    **fields: Any,
) -> list[Path]:
    """Write the LoRA that makes these changes, with a scale of 1.

    Args:
        folder: made if it is not there.
        changes: of whole columns, one for each weight.
        sites: all weights of the base model by name.
        heads: tensors of modules trained in full, by their keys in the file.
        dtype: of the factors, one of `DTYPES`; what it rounds is warned of.
        one_rank: fill the factors of every weight with zeros up to the largest rank.
        **fields: further fields of the configuration.

    Returns:
        The files.

    Raises:
        ValueError: LoRA cannot hold a change, nothing is changed, or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(dtype_name, DTYPES))}, got {dtype!r}")
    made = {change.module_name: Factors.of(change, sites[change.name]) for change in changes}
    factors = {name: one for name, one in made.items() if one.rank}
    if not factors:
        raise ValueError("the adapter trains no column of any weight, and a LoRA has a rank of 1 at least")
    largest = max(one.rank for one in factors.values())
    ranks = {name: largest if one_rank else one.rank for name, one in factors.items()}
    tensors = dict(heads)
    for name, one in factors.items():
        tensors |= one.tensors(name, ranks[name], dtype)
    _warn_of_rounding([one.deltas for one in factors.values()], dtype)
    modules = {site.module_name for site in sites.values()} | {name.rpartition(".")[0] for name in sites}
    config = peft.LoraConfig(
        r=largest,
        lora_alpha=largest,
        **_patterns(ranks, largest),
        target_modules=_targets(factors, modules),
        fan_in_fan_out=all(kind_of(one.site) == TRANSPOSED for one in factors.values()),
        inference_mode=True,
        **fields,
    )
    return write_folder(folder, config, tensors)


@form("lora", "PEFT's LoRA, as vLLM and other servers take it: of whole columns only, exact", True, ("dtype", "one_rank"))
def lora(adapter: AdapterFile, applied: tuple[Checkpoint, Edits] | None, folder: Path, **options: Any) -> list[Path]:
    """A folder for `PeftModel.from_pretrained` and for servers of LoRA."""
    checkpoint, edits = applied
    base = BaseModel.of(checkpoint.folder)
    sites = base.sites
    known = {name for name, site in sites.items() if kind_of(site) is not None}
    changes = changes_of_files("lora", adapter, checkpoint, edits, known, NO_FACTORS)
    files = write_lora(folder, exact(changes, adapter), sites, heads_of(adapter), **options, **fields_of(adapter))
    _warn_of_names(base, changes)
    return files


def exact(changes: Iterable[Change], adapter: AdapterFile) -> list[Change]:
    """The changes by values that give the trained weight to the bit when they are added to a 16-bit base.

    Over a quantized base the values themselves are what was trained, and are kept.
    """
    return [change if "quantized" in adapter.targets[change.name] else change.exact() for change in changes]


def _is_plain(module: nn.Module) -> bool:
    """Whether PEFT's factors of a convolution compute what a change of its weight does."""
    return module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"


def _patterns(ranks: Mapping[str, int], largest: int) -> dict[str, dict[str, int]]:
    """The ranks that are not the largest, by patterns as PEFT matches them: from the end of a module's name."""
    shared = _ends(ranks)
    own = {name: rank for name, rank in ranks.items() if rank != largest}
    pattern = {f"^{re.escape(name)}" if name in shared else name: rank for name, rank in own.items()}
    return {"rank_pattern": pattern, "alpha_pattern": dict(pattern)}


def _targets(names: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """What PEFT calls these modules: their names, or an expression where a name is the end of another module's, too."""
    names = sorted(names)
    ambiguous = _ends({*modules}.difference(names)).intersection(names)
    return "|".join(map(re.escape, names)) if ambiguous else names


def _ends(names: Iterable[str]) -> set[str]:
    """What comes after any dot of these names."""
    return {name[at + 1 :] for name in names for at, sign in enumerate(name) if sign == "."}


def _warn_of_names(base: BaseModel, changes: Sequence[Change]) -> None:
    """Say that servers of a model with a head will not find what was trained in one without."""
    first = next((change.name for change in changes if change.name not in base.own), None)
    if first is not None:
        warnings.warn(
            f"{first} is called so in a model without its head, and servers that load {base.kind} may leave the LoRA out without "
            f"a word; train on {base.kind} to serve it there",
            stacklevel=3,
        )


def _warn_of_rounding(deltas: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Say how many trained values a dtype does not hold."""
    count = sum(values.numel() for values in deltas)
    rounded = sum(int((values.to(dtype).to(values.dtype) != values).sum()) for values in deltas)
    if rounded:
        warnings.warn(
            f"{rounded:,} of {count:,} values of the LoRA are no {dtype_name(dtype)} numbers and were rounded to it: merged "
            "weights may differ from the trained ones there",
            stacklevel=3,
        )
