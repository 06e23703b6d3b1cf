"""Suites: folders of questions that say what the answers of a model must reach, and their results for CI."""
