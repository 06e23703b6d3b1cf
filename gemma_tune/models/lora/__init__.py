"""LoRA: arithmetic with low-rank factors, factors on a model's layers, and adapter files."""
