"""Shards a model over a mesh of devices: its arrays, and what its layers compute there."""
