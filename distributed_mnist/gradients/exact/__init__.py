"""Gradients for `--precision exact`: integers, which ranks may add in any order, over any parts of a
batch."""
