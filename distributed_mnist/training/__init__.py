"""Train a model on one rank, from the recipe to the last checkpoint.

Input: a `World`, a recipe and a data set. Output: trained weights, events for `reporting` and checkpoints
for `runs`. Read `loop` first: it is the whole training. `run` sets up what the loop needs.
"""
