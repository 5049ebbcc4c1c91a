"""The folder of a run on disk: where its files are, which process may write to it, and its checkpoints.

Input: the state of a run. Output: files that are complete or absent, and the restored state on resume.
`checkpoint` is the file format; `checkpoint_store` decides when to write and which checkpoints to keep.
"""
