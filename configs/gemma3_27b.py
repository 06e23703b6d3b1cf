"""Gemma 3 27B (instruct, text) with LoRA in bfloat16 on a TPU pod slice or several GPU machines.

    gemma-tune plan  --config=configs/gemma3_27b.py --mesh=fsdp:16 --hardware=v5e
    gemma-tune train --config=configs/gemma3_27b.py --distributed=auto

The mesh takes all devices of all processes; each has its part of the weights and its own row of a batch. On more than
16 devices, raise --batch_size to their number. A checkpoint holds the adapter and its optimizer state: about 1.5 GB.
"""

from gemma_tune import Config


def get_config() -> Config:
    return Config().replace(
        {
            "workdir": "runs/gemma3_27b",
            "model.source": "gemma3_instruct_27b_text",
            "model.precision": "bfloat16",
            "data.max_length": 1024,
            "lora.rank": 16,
            "lora.alpha": 32.0,
            "lora.target_layers": ["all-linear"],
            "optimizer.learning_rate": 2e-4,
            "training.mesh": "auto",
            "training.num_epochs": 2,
            "training.batch_size": 16,
            "training.checkpoint_every_steps": 100,
            "training.early_stopping_patience": 3,
        }
    )
