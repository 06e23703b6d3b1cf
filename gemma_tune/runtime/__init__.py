"""What starts Keras on JAX and speaks to the operating system: processes, memory, files, progress."""
