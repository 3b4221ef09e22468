"""What goes on while a model trains: the optimizer, moving masks, learning rates."""
