"""`dmnist doctor`: examine a machine or a job before something is trained on it.

In: a world of processes. Out: a list of findings, each with advice where something is wrong. `host`
examines one machine, `collectives` what the ranks do together.
"""
