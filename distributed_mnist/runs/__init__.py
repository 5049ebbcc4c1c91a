"""A run's folder on disk: where its files lie, who may write, and its checkpoints.

In: the state of a run. Out: files that are whole or absent, and the state again when a run is resumed.
`checkpoint` is the format, `checkpoint_store` decides when to write and which to keep.
"""
