"""sprand: fine-tune a model by training a small set of its own scalar weights.

model = sprand.apply(model, density=0.01, seed=0)   # freeze it, let 1 % of the entries train
opt = sprand.SparseAdamW(model, lr=1e-3)            # or any torch optimizer over sprand.parameters(model)
sprand.save(model, "adapter/")                      # values and a seed; sprand.load(model, "adapter/") brings them back
sprand.merge(model)                                 # keep the trained weights, drop the rest; sprand.unmerge: bit for bit back
"""

from . import native  # registers the operators and their compiled kernels
from .adapter import load, save
from .applying import apply, select
from .config import SparseConfig
from .dynamic import DynamicMask
from .layers import SparseLinear, SparseModule
from .mixing import combine
from .model import disabled, merge, named_parameters, parameters, switch, unmerge, write
from .optim import SparseAdamW
from .plots import plot_selection
from .rates import suggest_lr
from .selection.mask import Mask
from .summary import print_trainable_parameters, summary, visible_share
from .version import __version__

__all__ = [
    "DynamicMask",
    "Mask",
    "SparseAdamW",
    "SparseConfig",
    "SparseLinear",
    "SparseModule",
    "__version__",
    "apply",
    "combine",
    "disabled",
    "load",
    "merge",
    "named_parameters",
    "native",
    "parameters",
    "plot_selection",
    "print_trainable_parameters",
    "save",
    "select",
    "suggest_lr",
    "summary",
    "switch",
    "unmerge",
    "visible_share",
    "write",
]
