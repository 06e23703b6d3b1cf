"""Finds the files that a source names: on this machine, in folders, and on the Hugging Face Hub."""
