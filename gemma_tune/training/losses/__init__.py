"""Losses, and the loss scale of float16."""
