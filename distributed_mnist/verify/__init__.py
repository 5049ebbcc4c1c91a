"""`dmnist verify`: train a small job with a known answer and compare the results bit for bit.

Input: how many processes to test, and whether to inject faults. Output: a table, and PASS or which run
differs and where. `training_job` is one run, `chaos` is many runs under faults, `under_launcher` is for
torchrun, Slurm and MPI.
"""
