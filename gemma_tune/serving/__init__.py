"""Step 7: use the model. Generates answers here, or serves them over HTTP."""

from gemma_tune.serving.generation import generate, stream

__all__ = ["generate", "stream"]
