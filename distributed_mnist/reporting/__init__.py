"""What a person sees of a run: the terminal, `metrics.jsonl`, TensorBoard and the HTML report.

In: the events of a run, as they happen or as its files hold them. Out: text, files and pages. Nothing
here decides anything about the training.
"""
