"""LoRA: the factors' arithmetic, factors on layers, and adapter files."""
