"""The command line: flags, help and one-line error messages. Only this folder knows about flags.

Input: the user's command line. Output: an exit code, and calls to the other folders with plain arguments.
Start with `main`. `parser` parses the flags, and each process of a command runs a function in `workers`.
"""

from ..common.import_path import leave_out_current_folder

leave_out_current_folder()  # here, because a program that uses this folder imports it before anything else
