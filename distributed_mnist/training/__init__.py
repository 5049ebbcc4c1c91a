"""Train a model on one rank, from the recipe to the last checkpoint.

In: a `World`, a recipe and a data set. Out: trained weights, events for `reporting` and checkpoints for
`runs`. Read `loop` first: it is the whole training. `run` sets up what the loop needs.
"""
