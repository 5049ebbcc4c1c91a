"""The program from Python: `train`, `evaluate` and `load`, as the package exports them.

In: recipes, arrays and models as Python objects. Out: a `Result`, or an exception of `errors`.
"""
