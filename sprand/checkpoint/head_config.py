"""What the `config.json` of a merged checkpoint has to say of a head that an adapter brings: its class and its labels."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.architecture import of_head
from ..adapters.file import AdapterFile
from .edits import Edits
from .shards import Checkpoint

CONFIG = "config.json"


@dataclass(frozen=True)
class HeadConfig:
    """How `config.json` changes.

    Attributes:
        fields: its new fields.
        unsaid: what it lacks, in a sentence, where the adapter does not say what its head is.
    """

    fields: dict[str, Any]
    unsaid: str | None = None

    def text(self, checkpoint: Checkpoint) -> str:
        """The new `config.json`."""
        return json.dumps(checkpoint.config | self.fields, indent=2) + "\n"

    def write(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write the new `config.json`, if it is another one."""
        if self.fields:
            (folder / CONFIG).write_text(self.text(checkpoint), encoding="utf-8")


def head_config(checkpoint: Checkpoint, adapters: Iterable[AdapterFile], edits: Edits) -> HeadConfig:
    """What `config.json` has to say beside the base's, once adapters are merged.

    A head that the base has as well is of the base's class; what its labels are the adapter knows.
    """
    adapter = next((adapter for adapter in adapters if adapter.heads), None)
    if adapter is None or not checkpoint.config:
        return HeadConfig({})
    architecture = adapter.architecture or {}
    said, before = architecture.get("config", {}), of_head(checkpoint.config)
    names = [name for name in said if name != "architectures" or edits.added]
    is_known = not edits.added or "" in architecture.get("classes", {})
    return HeadConfig({n: said[n] for n in names if said[n] != before[n]}, None if is_known else _unsaid(adapter, edits))


def _unsaid(adapter: AdapterFile, edits: Edits) -> str:
    added = ", ".join(edits.added)
    if adapter.architecture is None:
        return (
            f"{CONFIG} is the base's: {adapter.path} does not say of which model {added} is; set architectures, id2label and "
            "label2id there to load it by from_pretrained"
        )
    return (
        f"{added} is in the files, but of no class of transformers, so from_pretrained loads the rest alone (sprand predict "
        "loads all of it, if a run of sprand finetune was merged)"
    )
