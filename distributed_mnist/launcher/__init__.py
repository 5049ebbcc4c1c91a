"""Start the processes of a group, wait for them, restart them, and end them.

`spawn` is our own launcher: it forks workers, forwards signals to them, and restarts the group when a
worker dies. `rank_process` runs one rank of a group, under any launcher.
"""
