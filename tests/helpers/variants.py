"""Tiny models with other sizes or settings than `tiny:FAMILY` has."""

import numpy as np

from gemma_tune.models.family import FAMILIES
from gemma_tune.models.load import correct_query_scale, load_model
from gemma_tune.models.sources.tiny import tiny_config


def variant(family, **changes):
    """Returns a CausalLM with a tiny model's tokenizer, and with a backbone that differs in these arguments."""
    backbone = FAMILIES[family].causal_lm.backbone_cls(**{**tiny_config(family), **changes})
    correct_query_scale(backbone)
    return FAMILIES[family].causal_lm(preprocessor=load_model(f"tiny:{family}").preprocessor, backbone=backbone)


def shake(model, rng, size=0.1):
    """Moves every weight: norms that are all alike would hide a mix-up."""
    for variable in model.backbone.weights:
        noise = size * rng.standard_normal(variable.shape)
        variable.assign(np.asarray(variable.value) + noise.astype(np.float32))
