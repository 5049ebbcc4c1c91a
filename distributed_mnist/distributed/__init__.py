"""The process group: its launcher, its rendezvous, its collectives and its watchdog.

Input: the environment variables that a launcher sets. Output: a `World`, whose methods are the program's
collectives. `watchdog` finds a rank that hangs, from the `heartbeat`s of all ranks.
"""
