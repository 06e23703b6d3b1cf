"""The arithmetic of low-rank factors, in both layouts, for any of KerasHub's linear layers.

A linear layer is an einsum: it sums over some axes of its kernel W, the inputs, and keeps the others, the outputs. With
factors it computes x·(W + s·A·B) (arXiv:2106.09685, equation 3):

| layout | A | B |
|---|---|---|
| `keras` | W's shape, its last axis replaced by R | [R, W's last axis] |
| `peft` | [inputs…, R] | [R, outputs…] |

They differ where a kernel is of several heads, [N, D, H] for queries, keys and values: there Keras has an A for each
head and a B for all of them, [N, D, R] and [R, H]. PEFT has [D, R] and [R, N, H]: the factors, transposed, of the
flattened matrix [N·H, D] that is a Linear's weight in Hugging Face's models.

DoRA (arXiv:2402.09353, equation 5) computes x·(m·(W + s·A·B)/‖W + s·A·B‖) with the norms over the inputs, one for each
output, and a magnitude m for each, [outputs…]. The norms are constants for the gradient, as in its section 4.3.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

_SMALLEST = 1e-30  # A column of zeros has the norm 1e-15, so that it can be divided by.


class LoraSpec(NamedTuple):
    """What a layer's factors are. rank: R. alpha: As it was asked for; `scale` is what it comes to."""

    layout: str
    rank: int
    alpha: float
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def scale(self) -> float:
        """s: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def with_rank(self, layout: str, rank: int) -> "LoraSpec":
        """Returns factors of another layout and rank with the same scale."""
        growth = rank / self.rank
        alpha = self.alpha * (math.sqrt(growth) if self.use_rslora else growth)
        return self._replace(layout=layout, rank=rank, alpha=alpha)


class FactorShapes(NamedTuple):
    """Shapes of A, B and the magnitude."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    magnitude: tuple[int, ...]


def factor_shapes(equation: str, kernel: tuple[int, ...], layout: str, rank: int) -> FactorShapes:
    """Returns the shapes of a layer's factors.

    Args:
        equation: Of the layer, such as `btd,ndh->btnh`.
        kernel: Shape of W.
        layout: `keras` or `peft`.
        rank: R.
    """
    inputs, axes, _ = _parts(equation)
    sizes = dict(zip(axes, kernel, strict=True))
    summed = tuple(sizes[axis] for axis in axes if axis in inputs)
    kept = tuple(sizes[axis] for axis in axes if axis not in inputs)
    if layout == "keras":
        return FactorShapes((*kernel[:-1], rank), (rank, kernel[-1]), kept)
    return FactorShapes((*summed, rank), (rank, *kept), kept)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def low_rank_product(equation: str, scale: float, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns scale·(x·A)·B.

    Its gradients are those of the definition. They are written out, because the ones that JAX derives transpose the
    gradient of the outputs, which is the largest array here; these transpose arrays of width rank.

    Args:
        equation: Of the layer.
        scale: s.
        x: Inputs, [B, L, …].
        a, b: Of either layout.
    """
    return jnp.tensordot(_inner(equation, scale, x, a), b, 1)


def _inner(equation: str, scale: float, x: jax.Array, a: jax.Array) -> jax.Array:
    inputs, factor, inner = inner_letters(equation, a.ndim)
    return scale * jnp.einsum(f"{inputs},{factor}->{inner}", x, a)


def _low_rank_forward(equation, scale, x, a, b):
    inner = _inner(equation, scale, x, a)
    return jnp.tensordot(inner, b, 1), (x, a, b, inner)


def _low_rank_backward(equation, scale, saved, gradient):
    x, a, b, inner = saved
    inputs, factor, letters = inner_letters(equation, a.ndim)
    rank, width = b.shape[0], math.prod(b.shape[1:])
    b_gradient = (inner.reshape(-1, rank).T @ gradient.reshape(-1, width)).reshape(b.shape)
    flat = gradient.reshape(*gradient.shape[: gradient.ndim - b.ndim + 1], width)
    inner_gradient = scale * (flat @ b.reshape(rank, width).T)
    # The einsum's own gradients: in each, one operand and the output change places.
    x_gradient = jnp.einsum(f"{letters},{factor}->{inputs}", inner_gradient, a)
    rank_first = factor[-1] + factor[:-1]
    a_gradient = jnp.moveaxis(jnp.einsum(f"{letters},{inputs}->{rank_first}", inner_gradient, x), 0, -1)
    return x_gradient, a_gradient, b_gradient


low_rank_product.defvjp(_low_rank_forward, _low_rank_backward)


def kernel_update(equation: str, scale: float, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns s·A·B, of the kernel's shape. An embedding, [V, D], has no equation."""
    if not equation or _is_keras(equation, a.ndim):
        return scale * jnp.matmul(a, b)
    _, axes, _ = _parts(equation)
    of_a, of_b, _ = factor_letters(equation, a.ndim)
    return scale * jnp.einsum(f"{of_a},{of_b}->{axes}", a, b)


def kernel_norms(equation: str, kernel: jax.Array) -> jax.Array:
    """Returns ‖W‖ over the inputs, [outputs…]: the magnitude with which DoRA begins."""
    return jnp.sqrt(jnp.maximum(_squares(equation, kernel), _SMALLEST))


def merged_norms(equation: str, scale: float, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns ‖W + s·A·B‖ over the inputs, [outputs…], without making that sum:
    ‖W‖² + 2s·(W·A)·B + s²·B·(A·A)·B, of which the first reads W once and the second is a product of R columns.

    Args:
        equation: Of the layer.
        scale: s.
        kernel, a, b: float32.
    """
    _, axes, _ = _parts(equation)
    of_a, of_b, kept = factor_letters(equation, a.ndim)
    rank, other = of_a[-1], _unused(equation + of_a)
    shared = "".join(axis for axis in of_a[:-1] if axis in kept)  # The heads, where each has its A.
    crossed = jnp.einsum(f"{axes},{of_a}->{kept}{rank}", kernel, a)
    crossed = jnp.einsum(f"{kept}{rank},{of_b}->{kept}", crossed, b)
    gram = jnp.einsum(f"{of_a},{of_a[:-1]}{other}->{shared}{rank}{other}", a, a)
    half = jnp.einsum(f"{shared}{rank}{other},{of_b}->{kept}{other}", gram, b)
    squared = jnp.einsum(f"{kept}{other},{other}{of_b[1:]}->{kept}", half, b)
    total = _squares(equation, kernel) + 2 * scale * crossed + scale**2 * squared
    return jnp.sqrt(jnp.maximum(total, _SMALLEST))


def over_outputs(equation: str, values: jax.Array) -> jax.Array:
    """Returns [outputs…] in a shape that multiplies the kernel."""
    inputs, axes, _ = _parts(equation)
    sizes = iter(values.shape)
    return values.reshape([1 if axis in inputs else next(sizes) for axis in axes])


def _squares(equation: str, kernel: jax.Array) -> jax.Array:
    inputs, axes, _ = _parts(equation)
    return jnp.sum(jnp.square(kernel), axis=[place for place, axis in enumerate(axes) if axis in inputs])


def _parts(equation: str) -> tuple[str, str, str]:
    inputs, axes, outputs = equation.replace("->", ",").split(",")
    return inputs, axes, outputs


def _is_keras(equation: str, num_axes: int) -> bool:
    """Whether an A of so many axes is of Keras's layout; where both layouts are the same, it is."""
    return num_axes == len(_parts(equation)[1])


def inner_letters(equation: str, num_axes: int) -> tuple[str, str, str]:
    """Returns the letters of x, A and x·A, in which one that is free or the kernel's last stands for the rank."""
    inputs, axes, outputs = _parts(equation)
    if _is_keras(equation, num_axes):
        return inputs, axes, outputs
    rank = _unused(equation)
    summed = "".join(axis for axis in axes if axis in inputs)
    return inputs, summed + rank, "".join(letter for letter in inputs if letter not in axes) + rank


def factor_letters(equation: str, num_axes: int) -> tuple[str, str, str]:
    """Returns the letters of A and B, with one that the equation has not for the rank, and of the outputs."""
    inputs, axes, _ = _parts(equation)
    rank = _unused(equation)
    kept = "".join(axis for axis in axes if axis not in inputs)
    if _is_keras(equation, num_axes):
        return axes[:-1] + rank, rank + axes[-1], kept
    return "".join(axis for axis in axes if axis in inputs) + rank, rank + kept, kept


def _unused(letters: str) -> str:
    return next(letter for letter in "rzyxwvu" if letter not in letters)
