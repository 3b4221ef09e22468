"""Fine-tune a model by training a small set of its own scalar weights.

    model = sprand.apply(model, density=0.01, seed=0)   # freeze it, let 1 % of the entries train
    opt = sprand.SparseAdamW(model, lr=1e-3)            # or any torch optimizer over sprand.parameters(model)
    sprand.save(model, "adapter/")                      # values and a seed; sprand.load(model, "adapter/") brings them back
    sprand.merge(model)                                 # keep the trained weights, drop the rest

What trains is one small float32 parameter per weight, beside it; the weight stays the module's own frozen parameter. Before it
is used, its chosen entries are set to `cast(base + delta)`. So forward is the frozen model's own, backward computes the gradients
of the chosen entries alone, and what is trained is bit for bit what is merged; `unmerge` gives the base back, bit for bit.

- To start and to stop: `apply`, or `select` to choose entries first; `merge`, `unmerge`, `disabled`. All options: `SparseConfig`.
  `choose` makes a choice by one batch that would wait for the first training forward.
- To train: `SparseAdamW`, or any optimizer over `parameters`; `suggest_lr`; `DynamicMask` exchanges entries on the way.
- Adapters: `save`, `load`, `switch`, `combine`. A `Mask` is a choice of entries on its own.
- To look: `summary`, `print_trainable_parameters`, `visible_share`, `plot_selection`.
- `native` says which kernels run here; `write` is for code that reads weights without a forward.

With Hugging Face: `sprand.peft`, `sprand.integrations.transformers`. To serve: `sprand.serving`. In a shell: `sprand --help`.

The folders are rooms, and a room imports only rooms above it in this list:

    kernels, files                operators on tensors; files proven when read, replaced in one step
    layers                        modules whose chosen entries train
    selection                     which entries train
    adapters                      sets of trained entries: on a model, combined, on disk
    training, checkpoint          optimizer, moving masks, learning rates; the same on checkpoint files, with no model
    peft, serving                 doors for PEFT, and for models that serve
    integrations, cli             doors for other libraries, and the command `sprand`
"""

import sys

if sys.platform == "win32":
    raise ImportError("sprand needs Linux or macOS, whose locks and calls its files are written by; on Windows install it in WSL")

from .adapters.apply import apply, select
from .adapters.first_forward import choose
from .adapters.model import combine, disabled, merge, named_parameters, parameters, switch, unmerge, write
from .adapters.plots import plot_selection
from .adapters.save_and_load import load, save
from .adapters.summary import print_trainable_parameters, summary, visible_share
from .kernels import native  # registers the operators and their compiled kernels
from .layers.attached import SparseLinear
from .layers.module import SparseModule
from .selection.config import SparseConfig
from .selection.mask import Mask
from .training.dynamic import DynamicMask
from .training.optim import SparseAdamW
from .training.rates import suggest_lr
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
    "choose",
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
