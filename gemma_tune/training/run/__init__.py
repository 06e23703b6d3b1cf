"""Runs training in a workdir: the loop, its checkpoints and its metrics."""
