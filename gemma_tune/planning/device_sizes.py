"""Computes the sizes of a training step on each device of a mesh."""

from typing import Any, NamedTuple

from gemma_tune.models.family import family_of
from gemma_tune.planning.abstract_train_state import AbstractTrainState, bytes_per_device

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class DeviceSizes(NamedTuple):
    """The sizes of a training step on one device. A width is a count of numbers per token.

    Attributes:
        num_tokens: Number of positions in a micro-batch.
        num_targets: Number of positions with a loss in a micro-batch.
        row_length: Length of a row, L.
        num_micro_batches: Number of micro-batches in a step.
        num_layers: Number of decoder blocks.
        width: Width of the model, D.
        num_norms: Number of norms of width D in a decoder block.
        query: Width of the queries, N·H, on this device.
        key: Width of the keys, K·H, on this device. The values have the same.
        feed_forward: Width of the feed-forward layer, F, on this device.
        num_heads: Number of query heads, N, on this device.
        lora_width: Total width of LoRA's products x·A in a decoder block.
        trains_feed_forward: Whether the feed-forward layers are trained, by LoRA or whole: the inputs of their products
            are then saved for the backward pass.
        embedding_params: Number of parameters of the embedding, on all devices together.
        block_params: Number of parameters of all decoder blocks, on all devices together, without LoRA factors.
        block_bytes: Bytes of one decoder block's stored weights on this device, after `fsdp` has gathered them.
        embedding_bytes: Bytes of the stored embedding on this device.
        embedding_part: Share of the embedding that is on this device, from 0 to 1.
        trained_params: Number of trained parameters on this device.
        item_bytes: Bytes of a number in the compute dtype.
    """

    num_tokens: int
    num_targets: int
    row_length: int
    num_micro_batches: int
    num_layers: int
    width: int
    num_norms: int
    query: float
    key: float
    feed_forward: float
    num_heads: float
    lora_width: float
    trains_feed_forward: bool
    embedding_params: int
    block_params: int
    block_bytes: float
    embedding_bytes: float
    embedding_part: float
    trained_params: float
    item_bytes: int


def device_sizes(run: AbstractTrainState) -> DeviceSizes:
    """Returns the sizes of a run's training step on each device."""
    training, backbone = run.config.training, run.model.backbone
    shape = run.sharding.shape if run.sharding else None
    rows = training.batch_size // training.grad_accum_steps // (shape.num_row_shards if shape else 1)
    cuts = shape.model if shape else 1
    block = backbone.transformer_layers[0]
    heads, key_heads, head_width = _heads(block.attention)
    feed_forward = _feed_forward(backbone)
    weights = {**run.frozen, **run.state.trainable}
    of_blocks = {path: leaf for path, leaf in weights.items() if "token_embedding" not in path}
    of_embedding = [leaf for path, leaf in weights.items() if path.startswith(backbone.token_embedding.path)]
    lora = {path: leaf for path, leaf in run.state.trainable.items() if "/lora_" in path}
    gathered = sum(bytes_per_device(leaf) for leaf in of_blocks.values()) * (shape.fsdp if shape else 1)
    num_layers = len(backbone.transformer_layers)
    embedding_bytes = sum(map(bytes_per_device, of_embedding))
    embedding_params = backbone.vocabulary_size * backbone.hidden_dim
    return DeviceSizes(
        num_tokens=rows * run.config.row_length,
        num_targets=run.num_targets,
        row_length=run.config.row_length,
        num_micro_batches=training.grad_accum_steps,
        num_layers=num_layers,
        width=backbone.hidden_dim,
        num_norms=4 if getattr(block, "use_post_ffw_norm", False) or family_of(backbone) == "gemma4" else 2,
        query=_part(heads, cuts) * head_width,
        key=_part(key_heads, cuts) * head_width,
        feed_forward=_part(feed_forward, cuts),
        num_heads=_part(heads, cuts),
        lora_width=sum(_lora_width(path, leaf) for path, leaf in lora.items()) / num_layers,
        trains_feed_forward=training.method == "full" or any("ffw" in path for path in lora),
        embedding_params=embedding_params,
        block_params=num_layers * backbone.hidden_dim * (2 * head_width * (heads + key_heads) + 3 * feed_forward),
        block_bytes=gathered / num_layers,
        embedding_bytes=float(embedding_bytes),
        embedding_part=embedding_bytes / sum(leaf.size * leaf.dtype.itemsize for leaf in of_embedding),
        trained_params=sum(bytes_per_device(leaf) / leaf.dtype.itemsize for leaf in run.state.trainable.values()),
        item_bytes=_BYTES[backbone.compute_dtype],
    )


def _heads(attention: Any) -> tuple[int, int, int]:
    """Returns N, K and H."""
    kv_heads = getattr(attention, "effective_num_kv_heads", attention.num_key_value_heads)
    return attention.num_query_heads, kv_heads, attention.head_dim


def _feed_forward(backbone: Any) -> int:
    """Returns F. In Gemma 1 and 2, `intermediate_dim` counts the gate's product and the up projection together."""
    return backbone.intermediate_dim // (2 if family_of(backbone) in ("gemma", "gemma2") else 1)


def _part(length: int, cuts: int) -> float:
    return length / cuts if not length % cuts else float(length)


def _lora_width(path: str, factor: Any) -> int:
    """Returns the width of x·A. Keras's layout has an A for each head of queries, keys and values."""
    if not path.endswith("_a"):
        return 0
    by_head = factor.shape[0] if len(factor.shape) == 3 and "attention_output" not in path else 1
    return by_head * factor.shape[-1]
