"""The arithmetic of quantization: pure functions on arrays; imports no Keras."""
