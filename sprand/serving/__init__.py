"""Serving: adapters switched in a live model, and an inference copy that follows a training model by its changed entries."""

from .pool import AdapterPool
from .receiver import DeltaReceiver
from .statistics import Statistics
from .sync import DeltaSync

__all__ = ["AdapterPool", "DeltaReceiver", "DeltaSync", "Statistics"]
