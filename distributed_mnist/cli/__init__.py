"""The command line: flags, help and one-line errors. Only this folder knows flags.

In: the words a user types. Out: an exit code, and calls of the other folders with plain arguments.
Start with `main`; `parser` reads the flags, and `workers` is what each process of a command runs.
"""
