"""Quantization arithmetic: pure functions on arrays, without Keras."""
