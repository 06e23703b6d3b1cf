"""Examples and tokens on disk, found again by their content."""
