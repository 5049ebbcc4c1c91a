"""The networks, and the layers that they need beside torch's.

In: a model's name and the number of classes. Out: a `torch.nn.Module` with weights drawn from the seed.
A new model is an entry of `zoo.MODELS`.
"""
