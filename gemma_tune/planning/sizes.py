"""What a model's sizes come to on each device of a mesh."""

from typing import Any, NamedTuple

from gemma_tune.models.family import family_of
from gemma_tune.planning.abstract_train_state import AbstractTrainState, device_bytes

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Sizes(NamedTuple):
    """Of one device. Widths are numbers a token.

    Attributes:
        num_tokens: Positions that go through it at a time. num_targets: Those with a loss. row_length: L.
        num_micro_batches: In a step.
        num_layers: Decoder blocks. width: D. num_norms: Of that width in a block.
        query, key, feed_forward: N·H, K·H and F, the device's part. num_heads: The device's part of N.
        inner: Widths of LoRA's x·A in a block, together.
        trains_feed_forward: By LoRA or whole: the inputs of these products are then kept for the backward pass.
        embedding_params, block_params: All of them; of all blocks, without what LoRA adds.
        block_bytes: Of one block's weights as they are held, on this device once they are gathered.
        embedding_bytes, embedding_part: What is here of the embedding as it is held, and its share of all of it.
        trained_params: On this device. item_bytes: Of a number in the arithmetic.
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
    inner: float
    trains_feed_forward: bool
    embedding_params: int
    block_params: int
    block_bytes: float
    embedding_bytes: float
    embedding_part: float
    trained_params: float
    item_bytes: int


def sizes_of(run: AbstractTrainState) -> Sizes:
    """Returns the sizes of a run's step on each device."""
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
    gathered = sum(device_bytes(leaf) for leaf in of_blocks.values()) * (shape.fsdp if shape else 1)
    num_layers = len(backbone.transformer_layers)
    embedding_bytes = sum(map(device_bytes, of_embedding))
    embedding_params = backbone.vocabulary_size * backbone.hidden_dim
    return Sizes(
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
        inner=sum(_inner(path, leaf) for path, leaf in lora.items()) / num_layers,
        trains_feed_forward=training.method == "full" or any("ffw" in path for path in lora),
        embedding_params=embedding_params,
        block_params=num_layers * backbone.hidden_dim * (2 * head_width * (heads + key_heads) + 3 * feed_forward),
        block_bytes=gathered / num_layers,
        embedding_bytes=float(embedding_bytes),
        embedding_part=embedding_bytes / sum(leaf.size * leaf.dtype.itemsize for leaf in of_embedding),
        trained_params=sum(device_bytes(leaf) / leaf.dtype.itemsize for leaf in run.state.trainable.values()),
        item_bytes=_BYTES[backbone.compute_dtype],
    )


def _heads(attention: Any) -> tuple[int, int, int]:
    """Returns N, K and H."""
    kv_heads = getattr(attention, "effective_num_kv_heads", attention.num_key_value_heads)
    return attention.num_query_heads, kv_heads, attention.head_dim


def _feed_forward(backbone: Any) -> int:
    """Returns F. Gemma 1 and 2 count both products of the gated layer in intermediate_dim."""
    return backbone.intermediate_dim // (2 if family_of(backbone) in ("gemma", "gemma2") else 1)


def _part(length: int, cuts: int) -> float:
    return length / cuts if not length % cuts else float(length)


def _inner(path: str, factor: Any) -> int:
    """Returns the width of x·A: Keras's layout has an A for each head of query, key and value."""
    if not path.endswith("_a"):
        return 0
    by_head = factor.shape[0] if len(factor.shape) == 3 and "attention_output" not in path else 1
    return by_head * factor.shape[-1]
