"""One training step: as it is written, and captured as a graph that a GPU repeats."""
