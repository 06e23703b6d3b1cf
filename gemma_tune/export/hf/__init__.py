"""Exports models as Hugging Face directories: config, tensors and tokenizer."""
