"""The spaces that are searched when no other is given, one for each method.

Ranges and their reasons:

* Learning rate: the best one for LoRA is about ten times that of full fine-tuning and hardly depends on the rank
  ("LoRA Without Regret", Thinking Machines, 2025). Each range is centered on the method's default, a factor of ten up
  and down, on a logarithmic scale.
* Rank, and layers that get factors: more layers help more than a higher rank (QLoRA, arXiv:2305.14314, section 4).
* Alpha isn't searched: it scales the update, as the learning rate does, so that both together say the same twice.
* LoRA+ (arXiv:2402.12354): the ratio of the learning rates of B and A; 16 suits many tasks, 1 is plain LoRA.
* Weight decay: matters with few examples and many trained weights, so for full fine-tuning above all.
* Warm-up and schedule: cheap to change, since they cost no compilation.
"""

from typing import Any

from gemma_tune.config import Config
from gemma_tune.tuning.spaces.read_space import parse_space
from gemma_tune.tuning.spaces.space import Space

_SCHEDULE: dict[str, Any] = {
    "optimizer.schedule": ["cosine", "linear", "constant"],
    "optimizer.warmup_steps": {"low": 0, "high": 30, "step": 10},
}
_LORA: dict[str, Any] = {
    "optimizer.learning_rate": {"low": 5e-5, "high": 5e-3, "log": True},
    "lora.rank": [4, 8, 16],
    "lora.target_layers": ["query,value", "all-linear"],
    "lora.loraplus_lr_ratio": [1.0, 4.0, 16.0],
    **_SCHEDULE,
}
_FULL: dict[str, Any] = {
    "optimizer.learning_rate": {"low": 5e-6, "high": 5e-4, "log": True},
    "optimizer.weight_decay": {"low": 1e-3, "high": 0.3, "log": True},
    **_SCHEDULE,
}
# Rounding in every step makes gradients noisier: a narrower range, and nothing that changes which weights are rounded.
_QAT: dict[str, Any] = {"optimizer.learning_rate": {"low": 5e-5, "high": 2e-3, "log": True}}


def default_space(config: Config) -> Space:
    """Returns the default space of a Config's method: lora, qlora, full, or any of them with `training.qat`."""
    if config.training.method == "full":
        return parse_space(_FULL)
    settings = dict(_LORA)
    if config.training.qat:
        settings |= _QAT
    if config.model.adapter:  # An earlier adapter keeps its rank and layers.
        settings = {path: value for path, value in settings.items() if path not in ("lora.rank", "lora.target_layers")}
    return parse_space(settings)
