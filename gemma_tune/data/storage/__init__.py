"""Stores examples and tokens on disk, and finds them again by their content."""
