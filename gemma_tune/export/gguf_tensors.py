"""A Gemma's weights as GGUF's tensors: names, shapes and values, made one after the other.

Names and layout are those of llama.cpp's conversion/gemma.py: linear layers as [outputs, inputs], norms as 1 + scale.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.export.floats import ROWS_AT_ONCE, embedding_rows, float_kernel
from gemma_tune.models.gguf_checkpoint import ARCHITECTURES, gguf_name

_LINEAR = {
    "mlp.gate_proj": "gating_ffw",
    "mlp.up_proj": "gating_ffw_2",
    "mlp.down_proj": "ffw_linear",
}


class GgufTensor(NamedTuple):
    """A tensor to be written.

    name: GGUF's. shape: In NumPy's order. rows: Called with (start, stop) of the first axis, gives float32.
    rows_at_once: To ask for.
    """

    name: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], np.ndarray]
    rows_at_once: int


def gguf_tensors(backbone: Any, family: str, num_tokens: int) -> Iterator[GgufTensor]:
    """Yields a backbone's tensors. LoRA counts as merged and codes as floats; the backbone stays as it is.

    Args:
        backbone: Of Gemma 1, 2 or 3.
        family: `gemma`, `gemma2` or `gemma3`.
        num_tokens: Of the tokenizer; rows of the embedding beyond them can't be met, and are left out.
    """
    model_type = ARCHITECTURES[family]
    width = backbone.hidden_dim
    embedding = embedding_rows(backbone.token_embedding)
    yield GgufTensor("token_embd.weight", (num_tokens, width), embedding, ROWS_AT_ONCE)
    for index, block in enumerate(backbone.transformer_layers):
        for part, shape, make in _parts(backbone, block, family):
            name = gguf_name(f"model.layers.{index}.{part}.weight", model_type)
            yield _whole(name, shape, make)
    yield _whole("output_norm.weight", (width,), lambda: _norm(backbone.layer_norm))


def _parts(backbone: Any, block: Any, family: str) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """Yields Hugging Face's name, the shape, and what makes the values."""
    attention, width, head = block.attention, backbone.hidden_dim, backbone.head_dim
    sizes = {"q": backbone.num_query_heads, "k": backbone.num_key_value_heads, "v": backbone.num_key_value_heads}
    for name, layer in _norms(block, family).items():
        yield name, tuple(layer.scale.shape), functools.partial(_norm, layer)
    for letter, layer in zip("qkv", (attention.query_dense, attention.key_dense, attention.value_dense), strict=True):
        shape = (sizes[letter] * head, width)
        yield f"self_attn.{letter}_proj", shape, functools.partial(_heads_first, layer)
    yield "self_attn.o_proj", (width, sizes["q"] * head), functools.partial(_inputs_last, attention.output_dense)
    for name, attribute in _LINEAR.items():
        layer = getattr(block, attribute)
        inputs, outputs = (int(size) for size in layer.kernel.shape)
        yield name, (outputs, inputs), functools.partial(_inputs_last, layer)


def _norms(block: Any, family: str) -> dict[str, Any]:
    norms = {"input_layernorm": block.pre_attention_norm}
    if family == "gemma":
        return norms | {"post_attention_layernorm": block.pre_ffw_norm}
    norms |= {
        "post_attention_layernorm": block.post_attention_norm,
        "pre_feedforward_layernorm": block.pre_ffw_norm,
        "post_feedforward_layernorm": block.post_ffw_norm,
    }
    if family == "gemma3":
        norms |= {"self_attn.q_norm": block.attention.query_norm, "self_attn.k_norm": block.attention.key_norm}
    return norms


def _norm(layer: Any) -> np.ndarray:
    return np.asarray(layer.scale.value, np.float32) + 1


def _heads_first(layer: Any) -> np.ndarray:
    """[heads, width, head width] -> [heads · head width, width]."""
    kernel = float_kernel(layer)
    return kernel.transpose(0, 2, 1).reshape(-1, kernel.shape[1])


def _inputs_last(layer: Any) -> np.ndarray:
    """[inputs, outputs], or [heads, head width, outputs], -> [outputs, inputs]."""
    kernel = float_kernel(layer)
    return kernel.reshape(-1, kernel.shape[-1]).T


def _whole(name: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> GgufTensor:
    return GgufTensor(name, shape, lambda start, stop: make()[start:stop], shape[0])
