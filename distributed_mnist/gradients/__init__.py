"""Compute the gradients of one step, per shard, and sum them over all ranks.

Input: a model, and the loss of each shard of the global batch. Output: the sum of the shards' gradients in
`parameter.grad`; with `--sync tree` it has the same bits at any number of processes. Read `all_reduce`
first.
"""
