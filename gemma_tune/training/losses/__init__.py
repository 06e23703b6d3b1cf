"""Losses that never hold the logits, and the loss scale of float16."""
