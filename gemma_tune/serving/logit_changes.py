"""Changes a request asks for in the model's logits: penalties, a bias of single tokens, and tokens that aren't allowed.

They are data and not part of the compiled program: every row has its own, and none of them compiles anything.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MAX_BIASED_TOKENS = 300  # As many as OpenAI's API takes.
BITS_PER_WORD = 32


class LogitChanges(NamedTuple):
    """The changes of one request.

    Attributes:
        presence_penalty: Number that is subtracted from the logit of each token that the answer has already.
        frequency_penalty: Number that is subtracted once for each time that the answer has the token.
        bias: (token id, number that is added to its logit), at most 300.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens of the answer must be counted."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


NO_CHANGES = LogitChanges()


class RowChanges(NamedTuple):
    """The changes of B rows.

    Attributes:
        presence_penalty: [B] float32.
        frequency_penalty: [B] float32.
        bias_ids: [B, 300] int32.
        bias: [B, 300] float32; 0 where a row has fewer.
        is_constrained: [B] bool, whether `allowed` counts.
        allowed: [B, ceil(V / 32)] int32. Bit i of word w is 1 where token 32·w + i may come next.
    """

    presence_penalty: Any
    frequency_penalty: Any
    bias_ids: Any
    bias: Any
    is_constrained: Any
    allowed: Any


def no_row_changes(num_rows: int, vocabulary_size: int) -> RowChanges:
    """Returns arrays, to be filled, for rows whose logits stay as they are."""
    return RowChanges(
        presence_penalty=np.zeros(num_rows, np.float32),
        frequency_penalty=np.zeros(num_rows, np.float32),
        bias_ids=np.zeros((num_rows, MAX_BIASED_TOKENS), np.int32),
        bias=np.zeros((num_rows, MAX_BIASED_TOKENS), np.float32),
        is_constrained=np.zeros(num_rows, bool),
        allowed=np.zeros((num_rows, -(-vocabulary_size // BITS_PER_WORD)), np.int32),
    )


def set_row(rows: RowChanges, row: int, changes: LogitChanges) -> None:
    """Writes the penalties and the bias of one request into its row."""
    rows.presence_penalty[row], rows.frequency_penalty[row] = changes.presence_penalty, changes.frequency_penalty
    for index, (token, value) in enumerate(changes.bias):
        rows.bias_ids[row, index], rows.bias[row, index] = token, value


def has_changes(rows: RowChanges) -> jax.Array:
    """Returns [] bool: whether any row changes anything."""
    is_penalized = (rows.presence_penalty != 0) | (rows.frequency_penalty != 0)
    return jnp.any(is_penalized | rows.is_constrained) | jnp.any(rows.bias != 0)


def changed_logits(logits: jax.Array, rows: RowChanges, counts: jax.Array, count_rows: jax.Array) -> jax.Array:
    """Returns the logits, [B, V] float32, after penalties, bias and constraints.

    Penalties follow the formula in OpenAI's API guide: for a token that the answer has c times so far, the logit falls
    by c · frequency_penalty, and by presence_penalty if c > 0. The prompt doesn't count.

    Args:
        logits: [B, V] float32.
        rows: Changes of the rows.
        counts: [N, V] int32, how often each answer has each token.
        count_rows: [B] int32, each row's row in `counts`.
    """

    def penalized() -> jax.Array:
        count = counts[count_rows]
        falls = rows.frequency_penalty[:, None] * count + rows.presence_penalty[:, None] * (count > 0)
        return logits - falls

    is_penalized = (rows.presence_penalty != 0) | (rows.frequency_penalty != 0)
    logits = lax.cond(jnp.any(is_penalized), penalized, lambda: logits)
    row_ids = jnp.arange(logits.shape[0])[:, None]
    biased = lax.cond(jnp.any(rows.bias != 0), lambda: logits.at[row_ids, rows.bias_ids].add(rows.bias), lambda: logits)
    return lax.cond(
        jnp.any(rows.is_constrained),
        lambda: jnp.where(_is_allowed(rows, logits.shape[-1]), biased, -jnp.inf),
        lambda: biased,
    )


def _is_allowed(rows: RowChanges, vocabulary_size: int) -> jax.Array:
    """Returns [B, V] bool."""
    bits = (rows.allowed[:, :, None] >> jnp.arange(BITS_PER_WORD)) & 1
    allowed = bits.reshape(bits.shape[0], -1)[:, :vocabulary_size] > 0
    return allowed | ~rows.is_constrained[:, None]
