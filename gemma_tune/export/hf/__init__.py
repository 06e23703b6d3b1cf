"""Hugging Face directories: config, tensors, tokenizer."""
