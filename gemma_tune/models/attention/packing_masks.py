"""Lets several examples share a row: attention masks that go by segment ids instead of padding.

Each decoder block of KerasHub makes its mask in `_compute_attention_mask(x, padding_mask, …)`. That method is wrapped
so that the padding
mask may hold segment ids: to what the block itself allows (what lies before, the sliding window) comes that both tokens
have the same id, and not 0. Rotary positions and windows are relative, so examples need no positions of their own. A
padding mask of ones and zeros means what it always meant.
"""

import types
from typing import Any

from keras import ops

from gemma_tune.errors import ModelError
from gemma_tune.models.attention.swap import takes_segment_ids
from gemma_tune.runtime.backend import keras_hub


def enable_packing(backbone: keras_hub.models.Backbone) -> None:
    """Wraps the masks of all decoder blocks. Decoding with a cache keeps KerasHub's own.

    Raises:
        ModelError: The blocks make no mask that could be wrapped; packing must be switched off for such a model.
    """
    blocks = getattr(backbone, "transformer_layers", [])
    if not blocks or not all(hasattr(block, "_compute_attention_mask") for block in blocks):
        raise ModelError(
            f"{type(backbone).__name__} makes its attention masks in a way that packing doesn't know. Set "
            "data.packing=false."
        )
    for block in blocks:
        if getattr(block._compute_attention_mask, "__func__", None) is not _packed_mask:
            object.__setattr__(block, "_unpacked_mask", block._compute_attention_mask)
            object.__setattr__(block, "_compute_attention_mask", types.MethodType(_packed_mask, block))


def _packed_mask(block: Any, x: Any, padding_mask: Any, *rest: Any, **named: Any) -> Any:
    """Returns [B, L, L], true where a query may look; or [B, L, 1] segment ids, 0 for padding, to attention that makes
    its masks from them.

    `rest` ends with (cache, cache_update_index) in every family.
    """
    cache = named["cache"] if "cache" in named else rest[-2]
    if cache is not None or padding_mask is None:
        return block._unpacked_mask(x, padding_mask, *rest, **named)
    segment_ids = ops.cast(padding_mask, "int32")
    if takes_segment_ids(getattr(block, "attention", None), segment_ids.shape[1]):
        return segment_ids[:, :, None]
    allowed = block._unpacked_mask(x, segment_ids > 0, *rest, **named)
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    return ops.logical_and(ops.cast(allowed, "bool"), same_segment)
