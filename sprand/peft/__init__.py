"""sprand as a PEFT method: `get_peft_model(model, SprandConfig(density=0.01))`, for Trainer, TRL and everything on PEFT.

Importing this module registers the method. `hotswap` puts the values of a saved adapter into a live one; `export_adapter` and
`import_adapter` go to and from LoRA, SHiRA and Super-Tuning; `accelerate` lets the latter two run on sprand's kernels.
"""

try:
    import peft  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "peft":
        raise
    how = "pip install 'peft==0.21.*' transformers accelerate"
    raise ModuleNotFoundError(
        f"sprand.peft needs the package peft: {how}. sprand.apply needs none of them", name="peft"
    ) from None

from .registration import check_peft, imported_from_peft, register

check_peft()
with imported_from_peft():
    from .config import SprandConfig
    from .faster import accelerate
    from .hotswap import hotswap
    from .interchange import export_adapter, import_adapter
    from .layer import SprandLayer
    from .lora_conversion import install
    from .model import SprandModel
    from .waiting import register as register_waiting

register(SprandConfig, SprandModel)
install()
register_waiting()

__all__ = ["SprandConfig", "SprandLayer", "SprandModel", "accelerate", "export_adapter", "hotswap", "import_adapter"]
