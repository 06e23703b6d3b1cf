"""Factors of one layout as those of the other, so that the layer computes the same.

The layouts differ where a kernel is of N heads, [N, D, H] (low_rank.py). There the update of Keras's factors, A [N, D,
R] and B [R, H], has up to N·R dimensions: as PEFT's they are of rank N·R, with the heads' A side by side and a B that
is block-diagonal, a copy of Keras's for each head. PEFT's, A [D, R] and B [R, N, H], become Keras's of rank N·R with
their B for each head below one another, and an A for each head that is zero but for its own part; or of rank R/N where
B is such a diagonal. The scale stays what it was, so alpha grows with the rank.
"""

import math
from typing import Any

import numpy as np

from gemma_tune.models.layers import lora_layers
from gemma_tune.models.lora.enable import enable_on_layers
from gemma_tune.models.lora.factors import LoraSpec
from gemma_tune.models.lora.layers import equation_of, factors_of, lora_spec_of, remove_factors
from gemma_tune.runtime.backend import keras_hub
from gemma_tune.runtime.processes import fetch_to_host

Converted = tuple[LoraSpec, np.ndarray, np.ndarray]


def to_peft(equation: str, lora_spec: LoraSpec, a: np.ndarray, b: np.ndarray) -> Converted:
    """Returns factors of PEFT's layout, and what they are.

    Args:
        equation: Of the layer; "" for an embedding.
        low_rank: What the factors are.
        a, b: Of either layout.
    """
    if lora_spec.layout == "peft" or not _has_heads(equation):
        return lora_spec._replace(layout="peft"), a, b
    heads, width, rank = a.shape
    side_by_side = np.moveaxis(a, 0, 1).reshape(width, heads * rank)
    diagonal = np.zeros((heads, rank, heads, b.shape[1]), b.dtype)
    for head in range(heads):
        diagonal[head, :, head] = b
    return lora_spec.with_rank("peft", heads * rank), side_by_side, diagonal.reshape(heads * rank, heads, -1)


def to_keras(equation: str, lora_spec: LoraSpec, a: np.ndarray, b: np.ndarray) -> Converted:
    """Returns factors of Keras's layout, and what they are. Arguments as of `to_peft`."""
    if lora_spec.layout == "keras" or not _has_heads(equation):
        return lora_spec._replace(layout="keras"), a, b
    rank, heads, _ = b.shape
    if (shared := _shared_block(b)) is not None:
        of_heads = np.moveaxis(a.reshape(len(a), heads, -1), 1, 0)
        return lora_spec.with_rank("keras", rank // heads), of_heads, shared
    of_heads = np.zeros((heads, len(a), heads, rank), a.dtype)
    for head in range(heads):
        of_heads[head, :, head] = a
    below = np.moveaxis(b, 1, 0).reshape(heads * rank, -1)
    return lora_spec.with_rank("keras", heads * rank), of_heads.reshape(heads, len(a), -1), below


def _shared_block(b: np.ndarray) -> np.ndarray | None:
    """Returns the block that B, [R, N, H], repeats along a diagonal of N blocks and is zero beside, or None."""
    rank, heads, width = b.shape
    if rank % heads:
        return None
    blocks = b.reshape(heads, rank // heads, heads, width)
    rebuilt = np.zeros_like(blocks)
    for head in range(heads):
        rebuilt[head, :, head] = blocks[0, :, 0]
    return blocks[0, :, 0] if np.array_equal(rebuilt, blocks) else None


def _has_heads(equation: str) -> bool:
    """Whether a layer's kernel is [N, D, H], with the outputs on both sides of the inputs."""
    if not equation:
        return False
    inputs, axes, _ = equation.replace("->", ",").split(",")
    return axes[0] not in inputs


def convert_layout(backbone: keras_hub.models.Backbone, layout: str) -> None:
    """Gives a backbone's layers factors of another layout, with which it computes the same.

    Args:
        backbone: With LoRA.
        layout: `keras` or `peft`.
    """
    convert, layers = {"keras": to_keras, "peft": to_peft}[layout], lora_layers(backbone)
    converted: dict[str, list[Any]] = {}
    for layer in layers:
        a, b, *magnitude = (fetch_to_host(factor.value) for factor in factors_of(layer))
        converted[layer.path] = [*convert(equation_of(layer), lora_spec_of(layer), a, b), *magnitude]
    for layer in layers:
        remove_factors(layer)
    enable_on_layers(backbone, {path: lora_spec for path, (lora_spec, *_) in converted.items()}, seed=0)
    for layer in layers:
        for variable, value in zip(factors_of(layer), converted[layer.path][1:], strict=True):
            variable.assign(value)


def as_matrices(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns factors of PEFT's layout as its files have them, [R, in] and [out, R]."""
    rank = a.shape[-1]
    return np.ascontiguousarray(a.reshape(-1, rank).T), np.ascontiguousarray(b.reshape(rank, -1).T)


def from_matrices(
    a: np.ndarray, b: np.ndarray, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns PEFT's matrices, [R, in] and [out, R], in the shapes of a layer's factors; None where they don't fit."""
    sizes = (a_shape[-1], math.prod(a_shape[:-1])), (math.prod(b_shape[1:]), b_shape[0])
    if (a.shape, b.shape) != sizes:
        return None
    return np.ascontiguousarray(a.T).reshape(a_shape), np.ascontiguousarray(b.T).reshape(b_shape)
