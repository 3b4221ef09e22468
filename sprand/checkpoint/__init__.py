"""Checkpoints as files: merge adapters into them, take the difference of two, without loading a model."""
