"""Step 2: reads rows from files, TFDS data sets and samples, and makes examples of them."""
