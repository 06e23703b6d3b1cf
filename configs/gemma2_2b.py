"""Gemma 2 2B (instruct) with the Keras tutorial's LoRA, rank 4 on query and value, in bfloat16: one GPU with 12 GB.

gemma-tune train --config=configs/gemma2_2b.py --data=questions.jsonl
"""

from gemma_tune import Config


def get_config() -> Config:
    return Config().replace(
        {
            "workdir": "runs/gemma2_2b",
            "model.source": "gemma2_instruct_2b_en",
            "model.precision": "bfloat16",
            "data.max_length": 512,
            "lora.rank": 4,
            "lora.target_layers": ["query", "value"],
            "optimizer.learning_rate": 5e-4,
            "training.num_epochs": 3,
            "training.batch_size": 4,
            "training.early_stopping_patience": 3,
        }
    )
