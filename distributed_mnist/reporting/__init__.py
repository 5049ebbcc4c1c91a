"""Report a run: on the terminal, in `metrics.jsonl`, in TensorBoard and as an HTML report.

Input: the events of a run, as they happen or from its files. Output: text, files and pages. Nothing here
affects the training.
"""
