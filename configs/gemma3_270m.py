"""Gemma 3 270M on a support desk's questions, LoRA on all linear layers, on CPU or any GPU or TPU.

    gemma-tune train --config=configs/gemma3_270m.py --data=questions.jsonl

The model is the `demo` package's (base weights, about 4 bits). With Kaggle access, --model=gemma3_270m has the original
weights and --model=gemma3_instruct_270m those that already follow instructions.
"""

from gemma_tune import Config


def get_config() -> Config:
    return Config().replace(
        {
            "workdir": "runs/gemma3_270m",
            "model.source": "demo",
            "data.max_length": 256,
            "lora.rank": 16,
            "lora.alpha": 32.0,
            "lora.target_layers": ["all-linear"],
            "optimizer.learning_rate": 1e-3,
            "optimizer.schedule": "linear",
            "optimizer.warmup_steps": 5,
            "training.num_epochs": 3,
            "training.batch_size": 1,
            "training.early_stopping_patience": 3,
        }
    )
