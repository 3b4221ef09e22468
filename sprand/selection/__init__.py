"""Which entries of a model train: the configuration, what it targets, random draws, scores and masks."""
