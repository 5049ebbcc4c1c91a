"""Exact products of matrices of integers, in whichever way a machine does them fastest.

The operands are int16 of at most `fixed_point.LIMIT`, and the results are exact, so the way changes
nothing. Some libraries and processors saturate sums of products of int8 at 16 bits. Therefore a machine
uses `int8` only if a test with the largest operands shows that it is exact there (`choice`).
"""
