"""Lets several examples share a row, by attention masks that are made from segment ids.

Each decoder block of KerasHub makes its mask in `_compute_attention_mask(x, padding_mask, …)`. That method is wrapped,
so that the padding mask may hold segment ids. A query then sees a key if the block itself allows it (causal order, the
sliding window) and both tokens have the same id, which isn't 0. Rotary positions and windows are relative, so examples
need no positions of their own. A padding mask of ones and zeros means what it meant before.
"""

import types
from typing import Any

from keras import ops

from gemma_tune.errors import ModelError
from gemma_tune.models.attention.shared_prefixes import current_prefix_trees, prefix_tree_mask
from gemma_tune.models.attention.swap import takes_segment_ids
from gemma_tune.runtime.backend import keras_hub


def enable_packing(backbone: keras_hub.models.Backbone) -> None:
    """Makes the decoder blocks take segment ids for a padding mask. Decoding with a KV cache keeps KerasHub's masks.

    Raises:
        ModelError: The blocks have no method that makes their masks, so that packing must be off for this model.
    """
    blocks = getattr(backbone, "transformer_layers", [])
    if not blocks or not all(hasattr(block, "_compute_attention_mask") for block in blocks):
        raise ModelError(
            f"{type(backbone).__name__} makes its attention masks in a way that packing doesn't support. Set "
            "data.packing=false."
        )
    for block in blocks:
        if getattr(block._compute_attention_mask, "__func__", None) is not _packed_mask:
            object.__setattr__(block, "_unpacked_mask", block._compute_attention_mask)
            object.__setattr__(block, "_compute_attention_mask", types.MethodType(_packed_mask, block))


def _packed_mask(block: Any, x: Any, padding_mask: Any, *rest: Any, **named: Any) -> Any:
    """Returns a [B, L, L] mask, true where a query sees a key.

    Attention that makes its masks itself gets [B, L, 1] segment ids, 0 for padding; rows of prefix trees have masks of
    their own. `rest` ends with (cache, cache_update_index) in every family.
    """
    cache = named["cache"] if "cache" in named else rest[-2]
    if cache is not None or padding_mask is None:
        return block._unpacked_mask(x, padding_mask, *rest, **named)
    if trees := current_prefix_trees():
        return prefix_tree_mask(trees)
    segment_ids = ops.cast(padding_mask, "int32")
    if takes_segment_ids(getattr(block, "attention", None), segment_ids.shape[1]):
        return segment_ids[:, :, None]
    allowed = block._unpacked_mask(x, segment_ids > 0, *rest, **named)
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    return ops.logical_and(ops.cast(allowed, "bool"), same_segment)
