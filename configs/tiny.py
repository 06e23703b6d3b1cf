"""A tiny Gemma 3 with random weights on the shipped sample: every step of a run in seconds, to try things out.

    gemma-tune train --config=configs/tiny.py

It learns the sample's words, not to answer.
"""

from gemma_tune import Config


def get_config() -> Config:
    return Config().replace(
        {
            "workdir": "runs/tiny",
            "model.source": "tiny:gemma3",
            "data.source": "sample:smartphone_support",
            "data.max_length": 128,
            "lora.rank": 8,
            "lora.target_layers": ["all-linear"],
            "optimizer.learning_rate": 5e-3,
            "training.num_epochs": 1,
            "training.batch_size": 8,
            "training.eval_every_steps": 10,
            "generation.max_new_tokens": 16,
        }
    )
