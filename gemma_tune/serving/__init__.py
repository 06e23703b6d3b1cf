"""Step 7: use the model. Decoding, and answers to chat turns."""

from gemma_tune.serving.generation import generate, stream

__all__ = ["generate", "stream"]
