"""Exports models as GGUF files, for llama.cpp, Ollama and similar programs."""
