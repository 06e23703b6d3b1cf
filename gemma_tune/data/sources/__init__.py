"""Step 2: rows from files, TFDS data sets and samples, and the examples that they hold."""
