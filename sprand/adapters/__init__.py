"""Adapters: sets of trained entries, on a model, combined, and on disk."""
