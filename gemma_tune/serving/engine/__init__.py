"""The serving engine: many requests at once on one model."""
