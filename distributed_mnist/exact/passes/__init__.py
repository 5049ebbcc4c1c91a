"""Passes of samples through a model, in training and in evaluation: what the layers need of them."""
