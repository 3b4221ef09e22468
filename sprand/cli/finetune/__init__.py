"""The program `sprand finetune`: settings, data, training, report."""
