"""The command line: flags, help and one-line error messages. Only this folder knows about flags.

Input: the user's command line. Output: an exit code, and calls to the other folders with plain arguments.
Start with `main`. `parser` parses the flags, and each process of a command runs a function in `workers`.
"""
