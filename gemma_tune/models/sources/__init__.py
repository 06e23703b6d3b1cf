"""Sources of models: names, presets, downloads, checkpoints, tokenizers, and tiny models."""
