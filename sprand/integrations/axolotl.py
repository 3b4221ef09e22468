"""sprand in axolotl: `plugins: [sprand.integrations.axolotl.SprandPlugin]`, `adapter: sprand`, `sprand_density: 0.01`.

The adapter is the one of `sprand.peft`: axolotl trains, saves, resumes and loads it (`lora_model_dir`) as any other of PEFT.
"""

from __future__ import annotations

import os
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, Field, model_validator
from transformers import PreTrainedModel

from ..peft import SprandConfig

NAME = "sprand"
OF_LORA = (
    "lora_r", "lora_alpha", "lora_target_linear", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
    "load_in_4bit", "load_in_8bit", "relora",
)  # fmt: skip


class SprandArgs(BaseModel):
    """The settings of an axolotl file that are fields of `SprandConfig`, with its defaults."""

    sprand_density: float | None = Field(None, description="Fraction of the targeted entries that train; 0.01 if not given.")
    sprand_budget: int | float | None = Field(None, description="Instead: number of entries, or fraction of all parameters.")
    sprand_target_modules: list[str] | str | None = Field(None, description="Names, a regular expression, or all-linear.")
    sprand_exclude_modules: list[str] | str | None = Field(None, description="Modules left out: names or an expression.")
    sprand_target_parameters: list[str] | None = Field(None, description="Further weights: embeddings, experts, biases.")
    sprand_modules_to_save: list[str] | None = Field(None, description="Modules trained in full.")
    sprand_layout: str | None = Field(None, description="unstructured or columns.")
    sprand_mask: str | None = Field(None, description="A mask file of sprand select, instead of a random draw.")
    sprand_seed: int | None = Field(None, description="Seed of the random draw.")

    @model_validator(mode="after")
    def nothing_is_ignored(self) -> SprandArgs:
        """Refuse settings that would do nothing."""
        adapter = getattr(self, "adapter", None)
        own = [name for name in SprandArgs.model_fields if getattr(self, name) is not None]
        if own and adapter != NAME:
            raise ValueError(f"{own[0]} is set, but adapter is {adapter!r}; set adapter: {NAME}")
        others = [name for name in OF_LORA if getattr(self, name, None)] if adapter == NAME else []
        if others:
            raise ValueError(
                f"{others[0]} does nothing with adapter: {NAME}, whose own settings are {', '.join(SprandArgs.model_fields)}"
            )
        return self


class SprandPlugin(BasePlugin):
    """Gives axolotl the adapter `sprand`."""

    def get_input_args(self) -> str:
        """Where axolotl finds the settings."""
        return f"{__name__}.{SprandArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The name that `adapter:` may have."""
        return [AdapterCapabilities(name=NAME)]

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, SprandConfig] | None:
        """Put the adapter into a model, a new one or the one in `lora_model_dir`.

        Args:
            model: the base model.
            cfg: axolotl's configuration.
            inference: do not train.
            config_only: make the config alone; a trainer of TRL puts the adapter in.

        Returns:
            The model (None if `config_only`) and the config; None if another adapter is asked for.
        """
        if cfg.adapter != NAME:
            return None
        fields = {name.removeprefix("sprand_"): cfg.get(name) for name in SprandArgs.model_fields}
        task = "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM"
        config = SprandConfig(task_type=task, **{name: value for name, value in fields.items() if value is not None})
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            config = model.peft_config["default"]
        else:
            model = get_peft_model(model, config)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            model.print_trainable_parameters()
        return model, config
