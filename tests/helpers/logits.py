"""The logits of a model, for one fixed row of tokens or for any tokens."""

import numpy as np

from gemma_tune.models.functional import hidden_states, params_scope


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


def logits_of(model, token_ids):
    """Returns logits [B, L, V] of token ids [B, L] without padding, through the forward pass of `models.functional`."""
    positions = np.broadcast_to(np.arange(token_ids.shape[1], dtype=np.int32), token_ids.shape)
    hidden = hidden_states(model.backbone, token_ids, np.ones_like(token_ids), positions)
    return np.asarray(model.backbone.token_embedding(hidden, reverse=True), np.float32)
