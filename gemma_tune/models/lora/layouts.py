"""Converts LoRA factors from one layout to the other, so that the layer computes the same.

The layouts differ where a kernel has N heads, [N, D, H] (factors.py). There, the update of Keras's factors, A [N, D, R]
and B [R, H], has a rank of up to N·R. In PEFT's layout they get rank N·R: the heads' A stand side by side, and B is
block-diagonal with a copy of Keras's B for each head. PEFT's factors, A [D, R] and B [R, N, H], become Keras's of rank
N·R: the heads' B stand below one another, and each head's A is zero except for its own part. Where B is such a block
diagonal, they become Keras's of rank R/N instead. The scale stays the same, so that alpha grows with the rank.
"""

import math
from typing import Any

import numpy as np

from gemma_tune.models.einsum import parse_einsum
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.lora.enable import enable_on_layers
from gemma_tune.models.lora.factors import LoraSpec
from gemma_tune.models.lora.layers import equation_of, factors_of, lora_spec_of, remove_factors
from gemma_tune.runtime.backend import keras_hub
from gemma_tune.runtime.processes import fetch_to_host

Converted = tuple[LoraSpec, np.ndarray, np.ndarray]


def to_peft(equation: str, lora_spec: LoraSpec, a: np.ndarray, b: np.ndarray) -> Converted:
    """Returns the spec, A and B of the same factors in PEFT's layout.

    Args:
        equation: Equation of the layer; "" for an embedding.
        lora_spec: Spec of the factors.
        a: A, in the spec's layout.
        b: B, in the spec's layout.
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
    """Returns the spec, A and B of the same factors in Keras's layout. The arguments are those of `to_peft`."""
    if lora_spec.layout == "keras" or not _has_heads(equation):
        return lora_spec._replace(layout="keras"), a, b
    rank, heads, _ = b.shape
    if (shared := _repeated_part(b)) is not None:
        of_heads = np.moveaxis(a.reshape(len(a), heads, -1), 1, 0)
        return lora_spec.with_rank("keras", rank // heads), of_heads, shared
    of_heads = np.zeros((heads, len(a), heads, rank), a.dtype)
    for head in range(heads):
        of_heads[head, :, head] = a
    below = np.moveaxis(b, 1, 0).reshape(heads * rank, -1)
    return lora_spec.with_rank("keras", heads * rank), of_heads.reshape(heads, len(a), -1), below


def _repeated_part(b: np.ndarray) -> np.ndarray | None:
    """Returns the part [R/N, H] that a block-diagonal B, [R, N, H], repeats for each head; None for another B."""
    rank, heads, width = b.shape
    if rank % heads:
        return None
    parts = b.reshape(heads, rank // heads, heads, width)
    rebuilt = np.zeros_like(parts)
    for head in range(heads):
        rebuilt[head, :, head] = parts[0, :, 0]
    return parts[0, :, 0] if np.array_equal(rebuilt, parts) else None


def _has_heads(equation: str) -> bool:
    """Returns whether a layer's kernel is [N, D, H], with outputs on both sides of the inputs."""
    return bool(equation) and 0 in parse_einsum(equation).kept_indices


def convert_layout(backbone: keras_hub.models.Backbone, layout: str) -> None:
    """Converts the factors of a backbone to another layout. It computes the same afterwards.

    Args:
        backbone: Backbone with LoRA.
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
    """Returns factors in PEFT's layout as the matrices of its files, [R, in] and [out, R]."""
    rank = a.shape[-1]
    return np.ascontiguousarray(a.reshape(-1, rank).T), np.ascontiguousarray(b.reshape(rank, -1).T)


def from_matrices(
    a: np.ndarray, b: np.ndarray, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns PEFT's matrices, [R, in] and [out, R], in the shapes of a layer's factors, or None if they don't fit."""
    sizes = (a_shape[-1], math.prod(a_shape[:-1])), (math.prod(b_shape[1:]), b_shape[0])
    if (a.shape, b.shape) != sizes:
        return None
    return np.ascontiguousarray(a.T).reshape(a_shape), np.ascontiguousarray(b.T).reshape(b_shape)
