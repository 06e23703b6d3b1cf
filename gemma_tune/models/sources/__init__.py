"""Where models come from: names, presets, downloads, checkpoints, tokenizers, and tiny models."""
