"""Data sets, from files or mirrors to tensors on every rank.

In: a data set's name and a folder. Out: a `Dataset` of NumPy arrays on rank 0, then `Data` on the device
of every rank. `datasets` is the way in; `broadcast` sends the arrays to the other ranks.
"""
