"""Start processes, look after them, and end them.

`spawn` is our own launcher: it forks workers, passes signals on, and restarts the group when a worker
dies. `rank_process` is the life of one process under any launcher.
"""
