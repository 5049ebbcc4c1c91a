"""The networks, and the layers that they need in addition to torch's.

Input: a model's name, the number of classes and a seed. Output: a `torch.nn.Module` with weights drawn from
the seed. To add a model, add an entry to `zoo.MODELS`.
"""
