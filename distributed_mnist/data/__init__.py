"""Data sets: from files or mirrors to tensors on every rank.

Input: the name of a data set and a folder. Output: a `Dataset` of NumPy arrays on rank 0, then `Data` on
the device of every rank. Start with `datasets`; `broadcast` sends the arrays to the other ranks.
"""
