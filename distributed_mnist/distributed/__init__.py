"""The group of processes: where a process stands, how ranks meet, and their collectives.

In: the environment that a launcher made. Out: a `World`, whose methods are the program's collectives.
A rank that hangs is found by `watchdog`, from the others' `heartbeat`.
"""
