"""GGUF files for llama.cpp, Ollama and their like."""
