"""Runs the trials of a search in one process, on one base model."""
