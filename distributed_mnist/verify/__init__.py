"""`dmnist verify`: train a small job with a known answer and compare the results bit for bit.

In: how many processes to try, and whether to inject faults. Out: a table, PASS, or which run differs
and where. `job` is one run, `chaos` is many runs under faults, `under_launcher` is torchrun or Slurm.
"""
