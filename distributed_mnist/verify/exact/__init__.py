"""The known-answer test in exact arithmetic: one answer on every machine.

Input: the ranks of a group, how many minutes to repeat the test, and a bit to flip. Output: PASS, or which
rank computed which step and layer wrongly. `command` is the test, `job` is what each rank computes,
`answer` is what must come out, and `diagnosis` finds out who is wrong.
"""
