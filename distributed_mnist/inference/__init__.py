"""Use trained networks: load a checkpoint, score it, classify pictures, let an ensemble vote.

In: a checkpoint, or a run's folder, and images. Out: logits, predictions and an `Evaluation`.
"""
