"""Lets texts in a row share their common beginning, so that it is computed once.

A row then holds trees of tokens: a beginning, followed by all the ways in which it goes on, one after the other. Each
token has a position in its text, which is not its place in the row, and it is seen by the tokens that follow it in any
text: those up to the end of its branch. KerasHub's layers rotate queries and keys by their place in the row, and cut
windows by it. Within `prefix_trees` they take the positions, once `enable_prefix_trees` has prepared them.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_tune.models.layers import iter_layers
from gemma_tune.runtime.backend import keras_hub


class PrefixTrees(NamedTuple):
    """Where the tokens of rows of trees belong.

    Attributes:
        positions: [B, L] int32 position of each token in its text.
        ends: [B, L] int32 place in the row behind the last token that sees this one; 0 for padding.
    """

    positions: Any
    ends: Any


_trees: contextvars.ContextVar[PrefixTrees | None] = contextvars.ContextVar("prefix_trees", default=None)


@contextlib.contextmanager
def prefix_trees(trees: PrefixTrees) -> Iterator[None]:
    """A context in which the decoder blocks compute rows of trees."""
    token = _trees.set(trees)
    try:
        yield
    finally:
        _trees.reset(token)


def current_prefix_trees() -> PrefixTrees | None:
    """Returns the trees of the rows that are being computed, or None if each segment of a row is one text."""
    return _trees.get()


def prefix_tree_mask(trees: PrefixTrees) -> jax.Array:
    """Returns a [B, L, L] mask, true where a query (second axis) sees a key; windows are not cut."""
    places = jnp.arange(trees.ends.shape[1])
    is_before = places[None, :] <= places[:, None]
    return is_before & (places[:, None] < trees.ends[:, None, :])


def prefix_tree_window(trees: PrefixTrees, window: int) -> jax.Array:
    """Returns a [B, L, L] mask, true where a key is less than `window` positions before a query."""
    return trees.positions[:, :, None] - trees.positions[:, None, :] < window


def enable_prefix_trees(backbone: keras_hub.models.Backbone) -> None:
    """Makes the rotary layers of a backbone take positions from `prefix_trees`. Without it they compute as before."""
    for layer in iter_layers(backbone, keras_hub.layers.RotaryEmbedding):
        if getattr(layer._compute_cos_sin_embedding, "func", None) is not _cos_sin_of_trees:
            by_position = functools.partial(_cos_sin_of_trees, layer._compute_cos_sin_embedding)
            object.__setattr__(layer, "_compute_cos_sin_embedding", by_position)


def _cos_sin_of_trees(compute: Callable, inputs: Any, start_index: Any = 0, positions: Any = None) -> Any:
    """Returns the cosines and sines of inputs [B, L, …, H], [B, L, …, H] each; [1, L, …, H] without trees."""
    cos_sin, trees = compute(inputs, start_index, positions), current_prefix_trees()
    if trees is None or positions is not None:  # Gemma 4 passes the positions itself.
        return cos_sin
    return tuple(jnp.asarray(values)[0][trees.positions] for values in cos_sin)
