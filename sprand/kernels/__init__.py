"""Operators on tensors: schemas, references, compiled kernels, and the plans by which a GPU runs them."""
