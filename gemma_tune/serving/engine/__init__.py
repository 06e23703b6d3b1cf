"""The serving engine: answers many requests at once with one model."""
