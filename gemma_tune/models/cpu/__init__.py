"""What serves training on a CPU alone."""
