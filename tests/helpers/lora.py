"""Kinds of LoRA, and models whose factors change their logits."""

import numpy as np
import pytest

from gemma_tune.models.functional import assign, parameters
from gemma_tune.models.lora.enable import enable_lora

METHODS = {
    "peft": {"layout": "peft"},
    "peft-rslora": {"layout": "peft", "use_rslora": True},
    "peft-dora": {"layout": "peft", "use_dora": True},
    "keras-rslora-dora": {"layout": "keras", "use_rslora": True, "use_dora": True},
}
_OFTEN = ("peft-dora", "keras-rslora-dora")
methods = pytest.mark.parametrize(
    "method",
    [pytest.param(m, id=name, marks=() if name in _OFTEN else pytest.mark.nightly) for name, m in METHODS.items()],
)


def randomize_b(model, rng):
    """Gives every factor B random values; at first they are zero."""
    trainable = parameters(model).trainable
    assign(
        model,
        {
            path: rng.normal(size=value.shape).astype(np.float32) * 0.1
            for path, value in trainable.items()
            if path.endswith("_b")
        },
    )


def with_lora(model, rng, method, targets=("all-linear",), rank=3, alpha=6.0):
    """Enables LoRA by a method and randomizes B and the magnitudes."""
    enable_lora(model.backbone, rank, alpha, targets, 0, **method)
    randomize_b(model, rng)
    magnitudes = {path: value for path, value in parameters(model).trainable.items() if path.endswith("_magnitude")}
    assign(model, {path: value * rng.uniform(0.8, 1.2, value.shape) for path, value in magnitudes.items()})
    return model
