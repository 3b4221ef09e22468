"""sprand as a PEFT method: `get_peft_model(model, SprandConfig(density=0.01))`, for Trainer, TRL and everything on PEFT.

Importing this module registers the method. `hotswap` puts the values of a saved adapter into a live one.
"""

from .config import SprandConfig
from .hotswap import hotswap
from .layer import SprandLayer
from .model import SprandModel
from .registration import register

register(SprandConfig, SprandModel)

__all__ = ["SprandConfig", "SprandLayer", "SprandModel", "hotswap"]
