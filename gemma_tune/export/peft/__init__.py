"""LoRA adapters for PEFT."""
