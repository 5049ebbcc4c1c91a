"""Arithmetic whose results have the same bits on every machine, for `--precision exact`.

The addition of floats is not associative, so a sum depends on the order in which a library, a processor or
a group of ranks adds. Here every sum over samples and every product of matrices is one of integers that are
small enough to be exact, and so has only one result. All other arithmetic consists of single operations
that IEEE 754 defines to the last bit. docs/explanation/exact.md explains it from the start.
"""
