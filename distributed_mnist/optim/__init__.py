"""Optimizers, the learning-rate schedule, and the average of the last weights.

Input: a model with gradients, and a recipe. Output: updated parameters. All state is in the optimizer's
`state_dict`, so checkpoints contain it.
"""
