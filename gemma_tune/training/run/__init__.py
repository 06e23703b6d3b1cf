"""A run in its workdir: the loop, checkpoints and metrics."""
