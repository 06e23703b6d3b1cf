"""Gemma 3 4B (instruct, text) with LoRA in bfloat16: one GPU with 16 GB.

    gemma-tune train --config=configs/gemma3_4b.py --data=questions.jsonl

Micro-batches of one row keep the memory of activations low; four of them make a step.
"""

from gemma_tune import Config


def get_config() -> Config:
    return Config().replace(
        {
            "workdir": "runs/gemma3_4b",
            "model.source": "gemma3_instruct_4b_text",
            "model.precision": "bfloat16",
            "data.max_length": 1024,
            "lora.rank": 16,
            "lora.alpha": 32.0,
            "lora.target_layers": ["all-linear"],
            "optimizer.learning_rate": 3e-4,
            "training.num_epochs": 2,
            "training.batch_size": 4,
            "training.grad_accum_steps": 4,
            "training.early_stopping_patience": 3,
        }
    )
