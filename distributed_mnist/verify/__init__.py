"""`dmnist verify`: train a small job with a known answer and compare the results bit for bit.

Input: how many processes to test, and whether to inject faults. Output: a table, and PASS or what is wrong
and where. `exact` is the test in exact arithmetic, with one answer for all machines. The modules here test
`--sync tree`, whose answer depends on the platform: `training_job` is one run, `chaos` is many runs under
faults, `under_launcher` is for torchrun, Slurm and MPI.
"""
