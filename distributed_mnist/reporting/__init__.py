"""Show a run to people: on the terminal, in `metrics.jsonl`, in TensorBoard and as an HTML report.

In: the events of a run, as they happen or from its files. Out: text, files and pages. Nothing here
decides anything about the training.
"""
