"""`dmnist doctor`: examine a machine or a job before training on it.

Input: a world of processes. Output: a list of findings, with advice if something is wrong. `host` examines
one machine, and `collectives` the communication between ranks.
"""
