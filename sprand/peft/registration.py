"""Registration: PEFT learns the method SPRAND, without any change to PEFT itself."""

from __future__ import annotations

from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTuner

NAME = "SPRAND"
TESTED = "0.21"
NEEDED = ("_get_adapter_state_dict", "_remap_adapter_state_dict_for_load")  # how a method saves and loads since 0.21


def check_peft() -> None:
    """Prove that PEFT lets a method from outside save and load its adapters.

    Raises:
        ImportError: The installed PEFT is too old, or cannot be extended.
    """
    missing = [name for name in NEEDED if not hasattr(BaseTuner, name)]
    if missing:
        raise ImportError(f"{_advice()} (BaseTuner has no {missing[0]})")


def register(config_cls: type, model_cls: type) -> Any:
    """Add the method to PEFT's list of types and to its tables; a second call changes nothing.

    Args:
        config_cls: the `PeftConfig` of the method.
        model_cls: its `BaseTuner`.

    Returns:
        The new member of `peft.PeftType`.

    Raises:
        ImportError: PEFT is older or newer than what this was tested with and works in another way.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    try:
        kind = _member(peft.PeftType)
        if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
            peft.utils.register_peft_method(
                name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
            )
    except Exception as error:
        raise ImportError(f"{_advice()} ({type(error).__name__}: {error})") from error
    return kind


def _advice() -> str:
    return (
        f"sprand.peft works with peft {TESTED}.*, and not with peft {peft.__version__}: install another, pip install "
        f"'peft=={TESTED}.*', or use sprand.apply, which needs no PEFT"
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


check_peft()
