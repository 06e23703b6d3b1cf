"""Reads the rows of files, each format in a module of its own."""
