"""Registration: PEFT learns the method SPRAND, without any change to PEFT itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTuner

NAME = "SPRAND"
TESTED = "0.21"
HOOKS = (  # of `BaseTuner`: what PEFT calls of a method from outside, and `SprandModel` answers
    "_cast_adapter_dtype", "_check_merge_allowed", "_check_target_module_exists", "_check_tied_modules", "_create_and_replace",
    "_get_adapter_state_dict", "_inject_parameters", "_prepare_adapter_config", "_remap_adapter_state_dict_for_load",
    "_remove_adapter_name_from_key", "_replace_module", "_unload_and_optionally_merge", "delete_adapter",
    "disable_adapter_layers", "enable_adapter_layers", "inject_adapter", "merge_adapter", "prefix", "set_adapter",
    "target_module_mapping", "tuner_layer_cls", "unmerge_adapter",
)  # fmt: skip


def check_peft() -> None:
    """Prove that this PEFT has what sprand needs of it, whichever version it is; one that was never tested is warned of.

    Raises:
        ImportError: A hook is missing.
    """
    known = {*dir(BaseTuner), *getattr(BaseTuner, "__annotations__", {})}
    missing = [name for name in HOOKS if name not in known]
    if missing:
        raise ImportError(_advice(f"BaseTuner has no {', '.join(missing)}"))
    if peft.__version__.split(".")[:2] != TESTED.split("."):
        warnings.warn(
            f"sprand.peft was tested with peft {TESTED}, never with {peft.__version__}, which has every hook that it needs; if "
            f"something is wrong, compare with pip install 'peft=={TESTED}.*'",
            stacklevel=2,
        )


@contextmanager
def imported_from_peft() -> Iterator[None]:
    """Name what is missing where an import from PEFT fails.

    Raises:
        ImportError: It does.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "peft":
            raise
        raise ImportError(_advice(str(error))) from error


def register(config_cls: type, model_cls: type) -> None:
    """Add the method to PEFT's list of types and to its tables; a second call changes nothing.

    Args:
        config_cls: the `PeftConfig` of the method.
        model_cls: its `BaseTuner`.

    Raises:
        ImportError: This PEFT keeps its types and tables in another way.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    try:
        if _member(peft.PeftType) not in PEFT_TYPE_TO_CONFIG_MAPPING:
            peft.utils.register_peft_method(
                name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
            )
    except Exception as error:
        raise ImportError(_advice(f"{type(error).__name__}: {error}")) from error


def _advice(missing: str) -> str:
    return (
        f"sprand.peft works with peft {TESTED} and newer ones that have its hooks for other methods; peft {peft.__version__} has "
        f"not ({missing}): pip install 'peft=={TESTED}.*', or use sprand.apply, which needs no PEFT"
    )


def _member(types: Any) -> Any:
    """The member of the str-Enum `PeftType`, made if it is not there: an Enum has no public way to add one."""
    if NAME in types.__members__:
        return types[NAME]
    member = str.__new__(types, NAME)
    member._name_, member._value_, member._sort_order_ = NAME, NAME, len(types.__members__)
    types._member_map_[NAME] = types._value2member_map_[NAME] = member
    types._member_names_.append(NAME)
    type.__setattr__(types, NAME, member)
    if types(NAME) is not member or NAME not in list(types):
        raise TypeError(f"{types.__name__} did not take the member {NAME}")
    return member
