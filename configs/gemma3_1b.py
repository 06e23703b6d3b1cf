"""Gemma 3 1B (instruct) with LoRA in bfloat16: one GPU or TPU core with 8 GB.

    gemma-tune train --config=configs/gemma3_1b.py --data=questions.jsonl

Kaggle consent and an API token are needed: `gemma-tune doctor` says whether they are there.
"""

from gemma_tune import Config


def get_config() -> Config:
    return Config().replace(
        {
            "workdir": "runs/gemma3_1b",
            "model.source": "gemma3_instruct_1b",
            "model.precision": "bfloat16",
            "data.max_length": 1024,
            "lora.rank": 16,
            "lora.alpha": 32.0,
            "lora.target_layers": ["all-linear"],
            "optimizer.learning_rate": 5e-4,
            "training.num_epochs": 3,
            "training.batch_size": 4,
            "training.early_stopping_patience": 3,
        }
    )
