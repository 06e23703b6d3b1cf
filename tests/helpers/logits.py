"""The logits of a model for one fixed row of tokens."""

import numpy as np

from gemma_tune.models.functional import params_scope


def logits(model, params=None):
    """Returns logits [1, 20, V], with some variables replaced by `params`."""
    inputs = {
        "token_ids": np.arange(10, 30)[None],
        "padding_mask": np.ones((1, 20), int),
        "position_ids": np.arange(20)[None],
    }
    inputs = {name: inputs[name] for name in model.backbone.input}
    with params_scope(model, params or {}):
        return np.asarray(model(inputs))
