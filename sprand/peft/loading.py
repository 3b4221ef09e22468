"""Loading a saved adapter through PEFT: what must hold before the model is touched."""

from __future__ import annotations

from torch import nn

from ..adapters.fingerprint import check_targets
from ..adapters.layout import check_versions, refuse_newer
from .config import SprandConfig


def check_loadable(config: SprandConfig, model: nn.Module, adapter_name: str) -> None:
    """Prove that PEFT's door can hold a saved adapter.

    Raises:
        ValueError: The adapter was written by a newer sprand, its configuration is damaged, it has frozen entries, or it
            trained a parameter in full that this model ties to another one.
    """
    called = f"adapter {adapter_name!r}"
    check_targets(f"{called}: targets", config.targets)
    if config.versions is not None:
        check_versions(f"{called}: versions", config.versions)
        refuse_newer(called, config.versions)
    if any("frozen" in target for target in config.targets.values()):
        raise ValueError(
            f"{called} has frozen entries (of a redrawn mask, sprand diff, or added rows), which PEFT has no place for; load it "
            "by sprand.load(model, path), or merge it into the files of its base by `sprand merge`"
        )
    if config.sparse_config is not None and config.modules_to_save:
        _refuse_tied(config, model, called)
        _refuse_both(config, called)


def _refuse_both(config: SprandConfig, called: str) -> None:
    """PEFT trains a module either in full or in part."""
    for module in config.modules_to_save:
        inside = [name for name in config.targets if name.startswith(f"{module}.")]
        if inside:
            raise ValueError(
                f"{called} trained parameters or buffers of {module} in full, and entries of {inside[0]} inside of it, which "
                "PEFT has no place for; load it by sprand.load(model, path)"
            )


def _refuse_tied(config: SprandConfig, model: nn.Module, called: str) -> None:
    """PEFT trains copies of modules: what is tied to one in the base would stay as it was."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for tied in names.values():
        if len(tied) > 1 and any(name.startswith(f"{module}.") for name in tied for module in config.modules_to_save):
            raise ValueError(
                f"{called} trained {tied[0]} in full, which this model ties to {tied[1]}, and PEFT would change one of them; "
                "load it by sprand.load(model, path)"
            )
