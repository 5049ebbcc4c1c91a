"""The Python API: `train`, `evaluate` and `load`, which the package exports.

Input: recipes, arrays and models as Python objects. Output: a `Result`, or an exception from `errors`.
"""
