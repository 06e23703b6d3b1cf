"""The compiled programs of a serving engine: reading a piece of a prompt, and one step of all answers.

They run KerasHub's own layers, with attention to the shared cache (`cached_attention`), products in the forms that are
fast for few tokens (`products`) and each row's adapter (`adapters`) in their named places. Every shape is fixed when
the engine starts; what changes from step to step is in small arrays.
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
from gemma_tune.serving.sampling import MAX_LOGPROBS, Logprobs, RowSampling, log_probabilities, sample

PREFILL_CHUNK = 64  # Tokens of a prompt that are read at once.
_TAILS = (16, 32, PREFILL_CHUNK)  # What the last of them are filled up to.
_SHORTEST_LENGTH = 128
_LENGTH_FACTOR = 2


class DecodeBatch(NamedTuple):
    """One step's rows, as arrays [B] of int32, `seed` uint32 and four float32.

    tokens: The last of each answer or prompt. starts, positions: Where they stand: of the region, and in it. slots:
    Which row of `seen`. adapters: Index. wants_logprobs: 0 or 1. sampling: RowSampling's fields.
    """

    tokens: Any
    starts: Any
    positions: Any
    slots: Any
    adapters: Any
    wants_logprobs: Any
    sampling: RowSampling


class DecodeOutput(NamedTuple):
    """What a step made: tokens [B], whether each row's logits were numbers [B], and Logprobs, where asked for."""

    tokens: Any
    are_finite: Any
    logprobs: Logprobs


class Programs:
    """Compiled functions of one model, with the cache that they read and write."""

    def __init__(
        self,
        model: keras.Model,
        factors: dict[str, StackedFactors],
        num_positions: int,
        max_length: int,
        num_slots: int,
    ):
        self._model = model
        self._layers = called_linear_layers(model)
        self._arrays = engine_params(model, self._layers, factors)
        self._lengths = _lengths_up_to(max_length)
        # One chunk that rows without a request write to, and as many positions as a look from the last one may see.
        self._unused_start = num_positions
        self._cache = empty_cache(model.backbone, num_positions + PREFILL_CHUNK + self._lengths[-1])
        self._num_slots = num_slots
        self.vocabulary_size: int = model.backbone.token_embedding.input_dim
        self._seen = jnp.zeros((num_slots + 1, self.vocabulary_size), bool)
        self._decode = jax.jit(self._decode_fn, donate_argnums=(1, 2))
        self._prefill = jax.jit(self._prefill_fn, donate_argnums=(1,))
        self._copy = jax.jit(_copy_chunks, donate_argnums=(0,))
        self._mark = jax.jit(lambda seen, slot, row: seen.at[slot].set(row), donate_argnums=(0,))

    def start(self, row_counts: Sequence[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles everything, by running it once.

        Args:
            row_counts: How many rows a step may have.
            progress: Called with how many programs are ready, and how many there are.
        """
        todo: list[Callable[[], Any]] = []
        for size in _TAILS:
            todo.append(functools.partial(self.prefill, [0] * size, self._unused_start, 0, 0))
        for count in row_counts:
            todo.append(functools.partial(self.decode, self.empty_batch(count)))
        todo.append(functools.partial(self.copy, self._unused_start, self._unused_start, 1))
        todo.append(functools.partial(self.mark_seen, self._num_slots, ()))
        for done, run in enumerate(todo):
            if progress:
                progress(done, len(todo))
            run()
        jax.block_until_ready((self._cache, self._seen))
        if progress:
            progress(len(todo), len(todo))

    def prefill(self, token_ids: Sequence[int], start: int, first: int, adapter: int) -> None:
        """Reads up to CHUNK tokens of a prompt, from position `first` of the region at `start` on."""
        size = next(size for size in _TAILS if size >= len(token_ids))
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(token_ids)] = token_ids
        place = np.array([start, first, adapter], np.int32)
        self._cache = self._prefill(self._arrays, self._cache, padded, place)

    def decode(self, rows: DecodeBatch) -> DecodeOutput:
        """Makes each row's next token. Rows beyond the requests come from `empty_batch`."""
        self._cache, self._seen, made = self._decode(self._arrays, self._cache, self._seen, rows)
        return jax.device_get(made)

    def copy(self, source: int, target: int, num_chunks: int) -> None:
        """Copies whole chunks of the cache from one place to another."""
        self._cache = self._copy(self._cache, np.array([source, target, num_chunks], np.int32))

    def mark_seen(self, slot: int, token_ids: Sequence[int]) -> None:
        """Says which tokens a slot's repetition penalty is for, until now."""
        row = np.zeros(self._seen.shape[1], bool)
        row[list(token_ids)] = True
        self._seen = self._mark(self._seen, np.int32(slot), row)

    def empty_batch(self, count: int) -> DecodeBatch:
        """Returns rows that nothing is asked of: greedy, and written where nothing is read."""
        zeros = np.zeros(count, np.int32)
        sampling = RowSampling(
            temperature=np.zeros(count, np.float32),
            top_k=zeros.copy(),
            top_p=np.ones(count, np.float32),
            min_p=np.zeros(count, np.float32),
            repetition_penalty=np.ones(count, np.float32),
            seed=np.zeros(count, np.uint32),
            index=zeros.copy(),
        )
        starts, slots = np.full(count, self._unused_start, np.int32), np.full(count, self._num_slots, np.int32)
        return DecodeBatch(zeros.copy(), starts, zeros.copy(), slots, zeros.copy(), zeros.copy(), sampling)

    def _prefill_fn(
        self, arrays: EngineParams, cache: list[LayerCache], token_ids: Any, place: Any
    ) -> list[LayerCache]:
        where = CacheIndex(place[:1], place[1:2], self._lengths)
        with self._running(arrays, cache, where, place[2:]) as updated:
            self._hidden(token_ids)
        return updated

    def _decode_fn(
        self, arrays: EngineParams, cache: list[LayerCache], seen: Any, rows: DecodeBatch
    ) -> tuple[Any, Any, DecodeOutput]:
        seen = seen.at[rows.slots, rows.tokens].set(True)
        with self._running(
            arrays, cache, CacheIndex(rows.starts, rows.positions, self._lengths), rows.adapters
        ) as updated:
            hidden = self._hidden(rows.tokens[:, None])[:, 0]
            logits = lm_head_logits(self._model.backbone.token_embedding, arrays.head, hidden, opaque_one(rows.starts))
        penalized = jnp.any(rows.sampling.repetition_penalty != 1)
        seen_here = lax.cond(penalized, lambda: seen[rows.slots], lambda: jnp.zeros(logits.shape, bool))
        tokens = sample(logits, rows.sampling, seen_here)
        logprobs = lax.cond(jnp.any(rows.wants_logprobs > 0), log_probabilities, _no_logprobs, logits, tokens)
        return updated, seen, DecodeOutput(tokens, jnp.isfinite(jnp.max(logits, axis=-1)), logprobs)

    def _hidden(self, token_ids: Any) -> jax.Array:
        ones = jnp.ones(token_ids.shape, jnp.int32)
        positions = jnp.zeros(token_ids.shape, jnp.int32)  # Given to the rotation by `attention_over_cache`.
        return hidden_states(self._model.backbone, token_ids, ones, positions)

    @contextlib.contextmanager
    def _running(
        self, arrays: EngineParams, cache: list[LayerCache], place: CacheIndex, adapters: Any
    ) -> Iterator[list]:
        """Within it, the backbone computes with `arrays`; yields the cache that it leaves."""
        one = opaque_one(place.starts)
        swaps = [
            (layer, linear_call(layer, arrays.matrices.get(path), arrays.factors.get(path), adapters, one))
            for path, layer in self._layers.items()
            if path in arrays.matrices or path in arrays.factors
        ]
        computing = params_scope(self._model, arrays.params), weights_are_rounded(), replaced_calls(swaps)
        with contextlib.ExitStack() as stack:
            for each in computing:
                stack.enter_context(each)
            yield stack.enter_context(attention_over_cache(cache, self._model.backbone, place))


def _no_logprobs(logits: jax.Array, tokens: jax.Array) -> Logprobs:
    num_rows = logits.shape[0]
    some = jnp.zeros((num_rows, MAX_LOGPROBS))
    return Logprobs(jnp.zeros(num_rows), some.astype(jnp.int32), some)


def _copy_chunks(cache: list[LayerCache], numbers: jax.Array) -> list[LayerCache]:
    source, target, num_chunks = numbers

    def copy_chunk(index: Any, cache: list[LayerCache]) -> list[LayerCache]:
        def of_array(array: jax.Array) -> jax.Array:
            chunk = lax.dynamic_slice_in_dim(array, source + index * PREFILL_CHUNK, PREFILL_CHUNK)
            return lax.dynamic_update_slice_in_dim(array, chunk, target + index * PREFILL_CHUNK, 0)

        return jax.tree.map(of_array, cache)

    return lax.fori_loop(0, num_chunks, copy_chunk, cache)


def _lengths_up_to(max_length: int) -> tuple[int, ...]:
    lengths = [_SHORTEST_LENGTH]
    while lengths[-1] < max_length:
        lengths.append(min(lengths[-1] * _LENGTH_FACTOR, -(-max_length // PREFILL_CHUNK) * PREFILL_CHUNK))
    return tuple(lengths)
