"""Layers that hold or train their weights in few bits."""
