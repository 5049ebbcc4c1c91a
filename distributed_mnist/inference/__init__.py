"""Use trained networks: load a checkpoint, evaluate it, classify pictures, combine an ensemble.

Input: a checkpoint or a run's folder, and images. Output: logits, predictions and an `Evaluation`.
"""
