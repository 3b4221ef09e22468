"""The program `sprand finetune`: its options, data, methods, training and report; `add` puts the command into a parser."""

from .command import add

__all__ = ["add"]
