"""`dmnist verify --sync tree` and `--chaos`: a small fp32 job, run as `dmnist train` runs it.

Its answer must not depend on the number of processes or on faults, but it depends on the platform. Input:
the ranks of a group, or how many faults to inject. Output: rows of the table, and what is wrong. `command`
is the test in a group, `chaos` is many runs under faults, and `training_job` is the job.
"""
