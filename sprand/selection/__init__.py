"""Choosing which entries of a model train: strategies, calibration on data, exact top-k."""
