"""Exports models for LiteRT (TensorFlow Lite), which runs on phones."""
