"""`dmnist verify`: train a small job with a known answer and compare bit for bit.

Input: the ranks of a group, how many minutes to repeat the test, and a bit to flip. Output: a table, and
PASS or which rank or link is wrong, in which step and layer. `command` is the test, `phases` is what the
ranks do, `job` is what each computes, `answer` is what must come out, and `diagnosis` finds who is wrong.

`tree` is the test of `--sync tree` and of training under faults.
"""
