"""Serving: adapters switched in a live model, and an inference copy that follows a training model by its changed entries."""

from .pool import AdapterPool, Statistics
from .receiver import DeltaReceiver
from .sync import DeltaSync

__all__ = ["AdapterPool", "DeltaReceiver", "DeltaSync", "Statistics"]
