"""Computes with low-rank factors, in both layouts, for any of KerasHub's linear layers.

A linear layer is an einsum. It sums over some axes of its kernel W, the inputs, and keeps the others, the outputs. With
LoRA factors A and B it computes x·(W + s·A·B) (arXiv:2106.09685, equation 3):

| layout | A | B |
|---|---|---|
| `keras` | W's shape, its last axis replaced by R | [R, W's last axis] |
| `peft` | [inputs…, R] | [R, outputs…] |

The layouts differ where a kernel has heads: [N, D, H] of queries, keys and values. There, Keras has an A for each head
and one B for all heads, [N, D, R] and [R, H]. PEFT has [D, R] and [R, N, H], the transposed factors of the matrix
[N·H, D] that is the weight of this layer in Hugging Face's models.

DoRA (arXiv:2402.09353, equation 5) computes x·(m·(W + s·A·B)/‖W + s·A·B‖). The norms are over the inputs, one for each
output, and so is the magnitude m, [outputs…]. The norms are constants for the gradient, as in section 4.3 of the paper.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma_tune.models.einsum import parse_einsum

_MIN_SQUARE = 1e-30  # A column of zeros counts as one of norm 1e-15, so that one can divide by it.


class LoraSpec(NamedTuple):
    """The kind of LoRA factors that a layer has.

    Attributes:
        layout: Layout of the factors, `keras` or `peft`.
        rank: Rank of the factors, R.
        alpha: Numerator of the scale.
        use_rslora: Whether the scale is alpha / sqrt(rank), as in rsLoRA (arXiv:2312.03732), instead of alpha / rank.
        use_dora: Whether a magnitude for each output is trained too, as in DoRA.
    """

    layout: str
    rank: int
    alpha: float
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def scale(self) -> float:
        """Returns s, by which A·B is multiplied."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def with_rank(self, layout: str, rank: int) -> "LoraSpec":
        """Returns the spec with another layout and rank, and with the alpha that keeps the scale."""
        growth = rank / self.rank
        alpha = self.alpha * (math.sqrt(growth) if self.use_rslora else growth)
        return self._replace(layout=layout, rank=rank, alpha=alpha)


class FactorShapes(NamedTuple):
    """The shapes of a layer's factors.

    Attributes:
        a: Shape of A.
        b: Shape of B.
        magnitude: Shape of DoRA's magnitude.
    """

    a: tuple[int, ...]
    b: tuple[int, ...]
    magnitude: tuple[int, ...]


def factor_shapes(equation: str, kernel: tuple[int, ...], layout: str, rank: int) -> FactorShapes:
    """Returns the shapes of a layer's factors.

    Args:
        equation: Equation of the layer, such as `btd,ndh->btnh`.
        kernel: Shape of W.
        layout: `keras` or `peft`.
        rank: R.
    """
    axes = parse_einsum(equation)
    summed = tuple(kernel[index] for index in axes.summed_indices)
    kept = tuple(kernel[index] for index in axes.kept_indices)
    if layout == "keras":
        return FactorShapes((*kernel[:-1], rank), (rank, kernel[-1]), kept)
    return FactorShapes((*summed, rank), (rank, *kept), kept)


def low_rank_product(equation: str, scale: float | jax.Array, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns scale·(x·A)·B.

    Its gradients are written out, because those that JAX derives transpose the gradient of the outputs, which is the
    largest array here. These transpose only arrays of width R. The scale has no gradient.

    Args:
        equation: Equation of the layer.
        scale: s, a constant or a [] array.
        x: Inputs, [B, L, …].
        a: A, in either layout.
        b: B, in the same layout.
    """
    if isinstance(scale, (int, float)):
        return _low_rank_product(equation, scale, None, x, a, b)
    return _low_rank_product(equation, None, scale.astype(x.dtype), x, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _low_rank_product(equation, constant, scale, x, a, b):
    """Returns the product, with a constant scale or one that is an array."""
    return jnp.tensordot(_inner(equation, constant if scale is None else scale, x, a), b, 1)


def _inner(equation: str, scale: float | jax.Array, x: jax.Array, a: jax.Array) -> jax.Array:
    inputs, factor, inner = inner_letters(equation, a.ndim)
    return scale * jnp.einsum(f"{inputs},{factor}->{inner}", x, a)


def _low_rank_forward(equation, constant, scale, x, a, b):
    inner = _inner(equation, constant if scale is None else scale, x, a)
    return jnp.tensordot(inner, b, 1), (scale, x, a, b, inner)


def _low_rank_backward(equation, constant, saved, gradient):
    scale, x, a, b, inner = saved
    inputs, factor, letters = inner_letters(equation, a.ndim)
    rank, width = b.shape[0], math.prod(b.shape[1:])
    b_gradient = (inner.reshape(-1, rank).T @ gradient.reshape(-1, width)).reshape(b.shape)
    flat = gradient.reshape(*gradient.shape[: gradient.ndim - b.ndim + 1], width)
    inner_gradient = (constant if scale is None else scale) * (flat @ b.reshape(rank, width).T)
    # The gradients of the einsum are einsums in which an operand and the output change places.
    x_gradient = jnp.einsum(f"{letters},{factor}->{inputs}", inner_gradient, a)
    rank_first = factor[-1] + factor[:-1]
    a_gradient = jnp.moveaxis(jnp.einsum(f"{letters},{inputs}->{rank_first}", inner_gradient, x), 0, -1)
    return jax.tree.map(jnp.zeros_like, scale), x_gradient, a_gradient, b_gradient


_low_rank_product.defvjp(_low_rank_forward, _low_rank_backward)


def kernel_update(equation: str, scale: float | jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns s·A·B in the kernel's shape. An embedding, [V, D], has the equation ""."""
    if not equation or _is_keras(equation, a.ndim):
        return scale * jnp.matmul(a, b)
    of_a, of_b, _ = factor_letters(equation, a.ndim)
    return scale * jnp.einsum(f"{of_a},{of_b}->{parse_einsum(equation).kernel}", a, b)


def kernel_norms(equation: str, kernel: jax.Array) -> jax.Array:
    """Returns ‖W‖ over the inputs, [outputs…]. It is DoRA's initial magnitude."""
    return jnp.sqrt(jnp.maximum(_squared_norms(equation, kernel), _MIN_SQUARE))


def merged_norms(equation: str, scale: float | jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns ‖W + s·A·B‖ over the inputs, [outputs…], without an array of the kernel's size.

    It is the root of ‖W‖² + 2s·(W·A)·B + s²·B·(A·A)·B, whose terms read W once each and are else of width R.

    Args:
        equation: Equation of the layer.
        scale: s.
        kernel: W, float32.
        a: A, float32, in either layout.
        b: B, float32, in the same layout.
    """
    of_a, of_b, kept = factor_letters(equation, a.ndim)
    rank, other = of_a[-1], _unused(equation + of_a)
    shared = "".join(axis for axis in of_a[:-1] if axis in kept)  # The heads, where each has its A.
    crossed = jnp.einsum(f"{parse_einsum(equation).kernel},{of_a}->{kept}{rank}", kernel, a)
    crossed = jnp.einsum(f"{kept}{rank},{of_b}->{kept}", crossed, b)
    gram = jnp.einsum(f"{of_a},{of_a[:-1]}{other}->{shared}{rank}{other}", a, a)
    half = jnp.einsum(f"{shared}{rank}{other},{of_b}->{kept}{other}", gram, b)
    squared = jnp.einsum(f"{kept}{other},{other}{of_b[1:]}->{kept}", half, b)
    total = _squared_norms(equation, kernel) + 2 * scale * crossed + scale**2 * squared
    return jnp.sqrt(jnp.maximum(total, _MIN_SQUARE))


def expand_over_inputs(equation: str, values: jax.Array) -> jax.Array:
    """Returns values [outputs…] in a shape that broadcasts against the kernel."""
    return jnp.expand_dims(values, parse_einsum(equation).summed_indices)


def _squared_norms(equation: str, kernel: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(kernel), axis=parse_einsum(equation).summed_indices)


def _is_keras(equation: str, num_axes: int) -> bool:
    """Returns whether an A with so many axes is in Keras's layout, also where both layouts are the same."""
    return num_axes == len(parse_einsum(equation).kernel)


def inner_letters(equation: str, num_axes: int) -> tuple[str, str, str]:
    """Returns the einsum letters of x, A and x·A. The rank has the kernel's last letter, or one that is free.

    Args:
        equation: Equation of the layer.
        num_axes: Number of A's axes, which shows its layout.
    """
    axes = parse_einsum(equation)
    if _is_keras(equation, num_axes):
        return axes.inputs, axes.kernel, axes.outputs
    rank = _unused(equation)
    return axes.inputs, axes.summed + rank, axes.batch + rank


def factor_letters(equation: str, num_axes: int) -> tuple[str, str, str]:
    """Returns the einsum letters of A, of B, and of the kernel's outputs. The rank has a letter that is free.

    Args:
        equation: Equation of the layer.
        num_axes: Number of A's axes, which shows its layout.
    """
    axes, rank = parse_einsum(equation), _unused(equation)
    if _is_keras(equation, num_axes):
        return axes.kernel[:-1] + rank, rank + axes.kernel[-1], axes.kept
    return axes.summed + rank, rank + axes.kept, axes.kept


def _unused(letters: str) -> str:
    return next(letter for letter in "rzyxwvu" if letter not in letters)
