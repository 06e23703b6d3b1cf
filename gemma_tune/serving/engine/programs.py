"""The compiled programs of a serving engine: prefill of a part of a prompt, and one decode step of all answers.

They run KerasHub's own layers with three replacements: attention reads the shared cache (`cached_attention`), matrix
products take the form that is fast for few tokens (`matmul`), and each row has its own adapter (`adapters`). All shapes
are fixed when the engine starts; what changes from step to step is in small arrays.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gemma_tune.models.blocks import replaced_calls
from gemma_tune.models.functional import hidden_states, params_scope
from gemma_tune.models.quantized.fake_quant_layers import weights_are_rounded
from gemma_tune.runtime.backend import keras
from gemma_tune.serving.engine.adapters import StackedFactors
from gemma_tune.serving.engine.cached_attention import CacheIndex, LayerCache, attention_over_cache, empty_cache
from gemma_tune.serving.engine.matmul import lm_head_logits, opaque_one
from gemma_tune.serving.engine.parameters import EngineParams, called_linear_layers, engine_params, linear_call
from gemma_tune.serving.logit_changes import RowChanges, changed_logits, has_changes, no_row_changes
from gemma_tune.serving.sampling import MAX_LOGPROBS, Logprobs, RowSampling, log_probabilities, sample

PREFILL_CHUNK = 64  # Prompt tokens that are prefilled at once.
_PREFILL_SIZES = (16, 32, PREFILL_CHUNK)  # A prompt's last chunk is padded to the next of these.
_MIN_ATTENTION_LENGTH = 128
_ATTENTION_LENGTH_FACTOR = 2


class DecodeBatch(NamedTuple):
    """The inputs of a decode step with B rows: int32 arrays [B], and the sampling settings.

    Attributes:
        token_ids: Last token of each prompt or answer.
        slot_starts: First position of each row's cache slot.
        positions: Position of the token in its slot.
        seen_rows: Each row's row in the tables of seen tokens and of the answers' tokens.
        adapters: Index of each row's adapter.
        wants_logprobs: 1 where log-probabilities are asked for, else 0.
        sampling: Sampling settings of each row.
        changes: Changes of each row's logits.
    """

    token_ids: Any
    slot_starts: Any
    positions: Any
    seen_rows: Any
    adapters: Any
    wants_logprobs: Any
    sampling: RowSampling
    changes: RowChanges


class DecodeOutput(NamedTuple):
    """What a decode step returns.

    Attributes:
        token_ids: [B] int32, the next token of each row.
        are_finite: [B] bool, whether the row's logits are finite.
        logprobs: Log-probabilities where they are asked for, else zeros.
    """

    token_ids: Any
    are_finite: Any
    logprobs: Logprobs


class Programs:
    """Compiled functions of one model, with the KV cache that they read and write.

    Args:
        model: A CausalLM.
        factors: Layer path -> LoRA factors of all adapters.
        num_positions: Size of the cache, in positions.
        max_length: Longest prompt and answer together, in tokens.
        max_concurrent: Answers that run at once.

    Attributes:
        vocabulary_size: Number of tokens, V.
    """

    def __init__(
        self,
        model: keras.Model,
        factors: dict[str, StackedFactors],
        num_positions: int,
        max_length: int,
        max_concurrent: int,
    ):
        self._model = model
        self._layers = called_linear_layers(model)
        self._params = engine_params(model, self._layers, factors)
        self._attention_lengths = _attention_lengths(max_length)
        # Behind the slots: a chunk that padding rows write to, and as many positions as attention may read from there.
        self._padding_start = num_positions
        self._cache = empty_cache(model.backbone, num_positions + PREFILL_CHUNK + self._attention_lengths[-1])
        self._padding_seen_row = max_concurrent
        self.vocabulary_size: int = model.backbone.token_embedding.input_dim
        self._seen = jnp.zeros((max_concurrent + 1, self.vocabulary_size), bool)
        self._counts = jnp.zeros(self._seen.shape, jnp.int32)
        self._no_changes: dict[int, RowChanges] = {}  # By number of rows; they stay on the device.
        self._decode = jax.jit(self._decode_fn, donate_argnums=(1, 2, 3))
        self._prefill = jax.jit(self._prefill_fn, donate_argnums=(1,))
        self._copy = jax.jit(_copy_chunks, donate_argnums=(0,))
        self._mark = jax.jit(lambda seen, row, tokens: seen.at[row].set(tokens), donate_argnums=(0,))
        self._clear = jax.jit(lambda counts, row: counts.at[row].set(0), donate_argnums=(0,))

    def start(self, batch_sizes: Sequence[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles all programs by running each of them once.

        Args:
            batch_sizes: Numbers of rows that a decode step may have.
            progress: Function called with the number of programs that are ready, and the number of all.
        """
        todo: list[Callable[[], Any]] = []
        for size in _PREFILL_SIZES:
            todo.append(functools.partial(self.prefill, [0] * size, self._padding_start, 0, 0))
        for size in batch_sizes:
            todo.append(functools.partial(self.decode, self.empty_batch(size)))
        todo.append(functools.partial(self.copy, self._padding_start, self._padding_start, 1))
        todo.append(functools.partial(self.mark_seen, self._padding_seen_row, ()))
        todo.append(functools.partial(self.clear_counts, self._padding_seen_row))
        for done, run in enumerate(todo):
            if progress:
                progress(done, len(todo))
            run()
        jax.block_until_ready((self._cache, self._seen, self._counts))
        if progress:
            progress(len(todo), len(todo))

    def prefill(self, token_ids: Sequence[int], slot_start: int, position: int, adapter: int) -> None:
        """Writes the keys and values of up to PREFILL_CHUNK prompt tokens to a slot, from `position` on."""
        size = next(size for size in _PREFILL_SIZES if size >= len(token_ids))
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(token_ids)] = token_ids
        where = np.array([slot_start, position, adapter], np.int32)
        self._cache = self._prefill(self._params, self._cache, padded, where)

    def decode(self, batch: DecodeBatch) -> DecodeOutput:
        """Returns each row's next token. Rows beyond the answers come from `empty_batch`."""
        state = (self._cache, self._seen, self._counts)
        self._cache, self._seen, self._counts, output = self._decode(self._params, *state, batch)
        return jax.device_get(output)

    def copy(self, source: int, target: int, num_chunks: int) -> None:
        """Copies whole chunks of the cache from one position to another."""
        self._cache = self._copy(self._cache, np.array([source, target, num_chunks], np.int32))

    def mark_seen(self, seen_row: int, token_ids: Sequence[int]) -> None:
        """Sets which tokens an answer's repetition penalty applies to, before its first step."""
        tokens = np.zeros(self._seen.shape[1], bool)
        tokens[list(token_ids)] = True
        self._seen = self._mark(self._seen, np.int32(seen_row), tokens)

    def clear_counts(self, seen_row: int) -> None:
        """Sets to 0 how often an answer has each token, before its first step. Without penalties nobody reads it."""
        self._counts = self._clear(self._counts, np.int32(seen_row))

    def empty_changes(self, size: int) -> RowChanges:
        """Returns arrays, to be filled, for rows whose logits stay as they are."""
        return no_row_changes(size, self.vocabulary_size)

    def empty_batch(self, size: int) -> DecodeBatch:
        """Returns padding rows: greedy, and written where nothing is read. Their `changes` can't be written to."""
        if size not in self._no_changes:
            self._no_changes[size] = jax.device_put(self.empty_changes(size))
        zeros = np.zeros(size, np.int32)
        sampling = RowSampling(
            temperature=np.zeros(size, np.float32),
            top_k=zeros.copy(),
            top_p=np.ones(size, np.float32),
            min_p=np.zeros(size, np.float32),
            repetition_penalty=np.ones(size, np.float32),
            seed=np.zeros(size, np.uint32),
            index=zeros.copy(),
        )
        return DecodeBatch(
            token_ids=zeros.copy(),
            slot_starts=np.full(size, self._padding_start, np.int32),
            positions=zeros.copy(),
            seen_rows=np.full(size, self._padding_seen_row, np.int32),
            adapters=zeros.copy(),
            wants_logprobs=zeros.copy(),
            sampling=sampling,
            changes=self._no_changes[size],
        )

    def _prefill_fn(
        self, params: EngineParams, cache: list[LayerCache], token_ids: Any, where: Any
    ) -> list[LayerCache]:
        index = CacheIndex(where[:1], where[1:2], self._attention_lengths)
        with self._replacements(params, cache, index, where[2:]) as updated:
            self._hidden(token_ids)
        return updated

    def _decode_fn(
        self, params: EngineParams, cache: list[LayerCache], seen: Any, counts: Any, batch: DecodeBatch
    ) -> tuple[Any, Any, Any, DecodeOutput]:
        seen = seen.at[batch.seen_rows, batch.token_ids].set(True)
        # The first step's token is the prompt's last.
        counts = counts.at[batch.seen_rows, batch.token_ids].add((batch.sampling.index > 0).astype(jnp.int32))
        index = CacheIndex(batch.slot_starts, batch.positions, self._attention_lengths)
        with self._replacements(params, cache, index, batch.adapters) as updated:
            hidden = self._hidden(batch.token_ids[:, None])[:, 0]
            embedding, one = self._model.backbone.token_embedding, opaque_one(batch.slot_starts)
            logits = lm_head_logits(embedding, params.lm_head, hidden, one)
        is_penalized = jnp.any(batch.sampling.repetition_penalty != 1)
        seen_by_row = lax.cond(is_penalized, lambda: seen[batch.seen_rows], lambda: jnp.zeros(logits.shape, bool))
        tokens = sample(
            logits,
            batch.sampling,
            seen_by_row,
            has_changes(batch.changes),
            lambda logits: changed_logits(logits, batch.changes, counts, batch.seen_rows),
        )
        logprobs = lax.cond(jnp.any(batch.wants_logprobs > 0), log_probabilities, _no_logprobs, logits, tokens)
        return updated, seen, counts, DecodeOutput(tokens, jnp.isfinite(jnp.max(logits, axis=-1)), logprobs)

    def _hidden(self, token_ids: Any) -> jax.Array:
        ones = jnp.ones(token_ids.shape, jnp.int32)
        positions = jnp.zeros(token_ids.shape, jnp.int32)  # Given to the rotation by `attention_over_cache`.
        return hidden_states(self._model.backbone, token_ids, ones, positions)

    @contextlib.contextmanager
    def _replacements(
        self, params: EngineParams, cache: list[LayerCache], index: CacheIndex, adapters: Any
    ) -> Iterator[list[LayerCache]]:
        """A context in which the backbone computes with `params`. Yields the list that becomes the new cache."""
        one = opaque_one(index.slot_starts)
        swaps = [
            (layer, linear_call(layer, params.matrices.get(path), params.factors.get(path), adapters, one))
            for path, layer in self._layers.items()
            if path in params.matrices or path in params.factors
        ]
        with (
            params_scope(self._model, params.variables),
            weights_are_rounded(),
            replaced_calls(swaps),
            attention_over_cache(cache, self._model.backbone, index) as updated,
        ):
            yield updated


def _no_logprobs(logits: jax.Array, tokens: jax.Array) -> Logprobs:
    num_rows = logits.shape[0]
    zeros = jnp.zeros((num_rows, MAX_LOGPROBS))
    return Logprobs(jnp.zeros(num_rows), zeros.astype(jnp.int32), zeros)


def _copy_chunks(cache: list[LayerCache], numbers: jax.Array) -> list[LayerCache]:
    source, target, num_chunks = numbers

    def copy_chunk(index: Any, cache: list[LayerCache]) -> list[LayerCache]:
        def of_array(array: jax.Array) -> jax.Array:
            chunk = lax.dynamic_slice_in_dim(array, source + index * PREFILL_CHUNK, PREFILL_CHUNK)
            return lax.dynamic_update_slice_in_dim(array, chunk, target + index * PREFILL_CHUNK, 0)

        return jax.tree.map(of_array, cache)

    return lax.fori_loop(0, num_chunks, copy_chunk, cache)


def _attention_lengths(max_length: int) -> tuple[int, ...]:
    """Returns the numbers of positions that attention may read, ascending up to the longest request."""
    lengths = [_MIN_ATTENTION_LENGTH]
    while lengths[-1] < max_length:
        lengths.append(min(lengths[-1] * _ATTENTION_LENGTH_FACTOR, -(-max_length // PREFILL_CHUNK) * PREFILL_CHUNK))
    return tuple(lengths)
