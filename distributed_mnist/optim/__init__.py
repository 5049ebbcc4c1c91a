"""Optimizers, the learning-rate schedule, and the average of the last weights.

In: a model with gradients, and a recipe. Out: updated parameters. All state is in the optimizer's
`state_dict`, so checkpoints hold it.
"""
