"""`dmnist bench`: measure the speed of this machine and compare it with a plain training loop.

Input: what to measure and how often. Output: a table, `bench.json` and a plot. `sections` has one function
for each measurement; `baseline` is the plain loop.
"""
