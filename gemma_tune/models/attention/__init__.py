"""Attention in training: its kernels, which of them a model takes, and the masks of packed rows."""
