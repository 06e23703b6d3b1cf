"""Starts Keras on JAX, and deals with the operating system: processes, memory, files, locks, progress."""
