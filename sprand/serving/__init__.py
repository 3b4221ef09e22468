"""Serving: adapters switched in a live model, and an inference copy that follows a training model by its changed entries."""

from .pool import AdapterPool, Statistics



__all__ = ["AdapterPool", "Statistics"]
