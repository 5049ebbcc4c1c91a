"""`dmnist bench`: measure the speed of this machine and compare it with a plain training loop.

In: what to measure and how often. Out: a table, `bench.json` and a plot. `sections` has one function
for each thing that is measured; `baseline` is the plain loop.
"""
