"""Gradients of one step: per shard, and summed over all ranks.

In: a model, and the loss of each shard of the global batch. Out: the sum of the shards' gradients in
`parameter.grad`, the same bits at any number of processes with `--sync tree`. Start with `all_reduce`.
"""
