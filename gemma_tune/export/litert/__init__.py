"""LiteRT (TensorFlow Lite) models for phones."""
