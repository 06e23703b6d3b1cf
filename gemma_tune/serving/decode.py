"""Generates tokens for a batch of prompts with KerasHub's own layers, step by step.

KerasHub's `generate` compiles for every prompt length, advances a batch in lockstep and returns only at the end. Here
sizes are rounded up to buckets, for each of which a prefill and a step are compiled; every row has its own position
(the model runs under `vmap`, so that `call_with_cache`'s scalar index becomes one for each row); and tokens are yielded
as they are generated.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_tune.models.cpu.bfloat16 import multiplies_bfloat16
from gemma_tune.models.functional import Params, parameters, params_scope, value_in_scope
from gemma_tune.models.quantized.fake_quant_layers import weights_are_rounded
from gemma_tune.models.quantized.qat import rounded_params
from gemma_tune.runtime.backend import is_single_cpu, keras
from gemma_tune.runtime.processes import fetch_to_host
from gemma_tune.serving.engine.matmul import lm_head_logits, lm_head_matmul_weights, opaque_one
from gemma_tune.serving.sampling import GREEDY, RowSampling, Sampling, sample, uniform_rows

_PROMPT_BUCKET = 32
_CACHE_BUCKET = 128
_ROW_BUCKET = 8


class _PromptBatch(NamedTuple):
    """Prompts padded to a bucket of rows and a bucket of positions.

    Attributes:
        token_ids: [rows, positions] int32.
        lengths: [rows] int32, lengths of the prompts; 1 for padding rows.
        seen: [rows, V] bool, tokens of each prompt.
        cache_length: Positions that the KV cache needs for each row.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    seen: np.ndarray
    cache_length: int


class Decoder:
    """Generates tokens with one model. Its programs are compiled when they are first used, and kept.

    Args:
        model: A CausalLM.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self._prefill = jax.jit(self._prefill_fn, static_argnames=("cache_length",))
        self._step = jax.jit(self._step_fn, donate_argnames=("cache", "seen"))
        # Where the CPU multiplies bfloat16, two rows take less time than one.
        is_bfloat16 = model.backbone.token_embedding.compute_dtype == "bfloat16"
        self._min_rows = 2 if is_bfloat16 and is_single_cpu() and multiplies_bfloat16() else 1

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampling: Sampling = GREEDY,
        seed: int = 0,
        params: Params | None = None,
    ) -> Iterator[list[int | None]]:
        """Yields the next token of each row, or None for a row that has stopped, until all rows have stopped.

        Args:
            prompts: Token ids of each row, `<bos>` included.
            max_new_tokens: Longest answer of a row, in tokens.
            stop_ids: Tokens that stop a row; they are not yielded.
            sampling: Sampling settings.
            seed: Random seed of the first row; the other rows' seeds count up from it.
            params: Arrays to use in place of the model's own.
        """
        if params is None:
            groups = parameters(self._model)
            params = {**groups.trainable, **groups.frozen}
        params = rounded_params(self._model, params)  # Here, so that it isn't done for every token.
        num_rows, batch = len(prompts), self._padded(prompts, max_new_tokens)
        rows = uniform_rows(sampling, len(batch.lengths), seed)
        tokens, cache, seen = self._prefill(
            params, batch.token_ids, batch.lengths, rows, batch.seen, cache_length=batch.cache_length
        )
        stopped = [False] * num_rows
        for step in range(max_new_tokens):
            new_tokens = fetch_to_host(tokens)[:num_rows].tolist()
            stopped = [done or token in stop_ids for done, token in zip(stopped, new_tokens, strict=True)]
            if all(stopped):
                return
            yield [None if done else token for done, token in zip(stopped, new_tokens, strict=True)]
            if step + 1 < max_new_tokens:
                rows = rows._replace(index=rows.index + np.int32(1))
                tokens, cache, seen = self._step(params, tokens, batch.lengths + step, cache, rows, seen)

    def _padded(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> _PromptBatch:
        num_rows, longest = len(prompts), max(len(prompt) for prompt in prompts)
        padded_rows = self._min_rows if num_rows == 1 else _round_up(num_rows, _ROW_BUCKET)
        prompt_length = _round_up(longest, _PROMPT_BUCKET)
        token_ids = np.zeros((padded_rows, prompt_length), np.int32)
        lengths = np.ones(padded_rows, np.int32)
        seen = np.zeros((padded_rows, self._model.backbone.token_embedding.input_dim), bool)
        for row, prompt in enumerate(prompts):
            token_ids[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
            seen[row, list(prompt)] = True
        cache_length = _round_up(max(prompt_length, longest + max_new_tokens), _CACHE_BUCKET)
        return _PromptBatch(token_ids, lengths, seen, cache_length)

    def _prefill_fn(
        self, params: Params, token_ids: Any, lengths: Any, rows: RowSampling, seen: Any, *, cache_length: int
    ):
        """Returns the first tokens, the cache and the seen tokens.

        Each prompt is padded at its end, which causal attention doesn't see, and which decode steps overwrite.
        """
        with params_scope(self._model, params), weights_are_rounded():
            cache = jax.tree.map(
                lambda spec: jnp.zeros(spec.shape, spec.dtype), self._cache_spec(token_ids.shape[0], cache_length)
            )
            _, hidden, cache = self._model.call_with_cache(token_ids, cache, 0)
            last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
            logits = self._logits(last[:, 0], lengths)
        tokens = sample(logits, rows, seen)
        # Marked here, so that the first step gets an array that lies where those of later steps do: else it would be
        # compiled apart.
        return tokens, cache, _marked(seen, tokens)

    def _step_fn(self, params: Params, tokens: Any, positions: Any, cache: Any, rows: RowSampling, seen: Any):
        """Returns the next tokens, the cache and the seen tokens, given a token and position of each row, both [B]."""

        def one_row(token, position, row_cache):
            row_cache = jax.tree.map(lambda leaf: leaf[None], row_cache)
            _, hidden, row_cache = self._model.call_with_cache(token[None, None], row_cache, position)
            return hidden[0, 0], jax.tree.map(lambda leaf: leaf[0], row_cache)

        with params_scope(self._model, params), weights_are_rounded():
            hidden, cache = jax.vmap(one_row)(tokens, positions, cache)
            logits = self._logits(hidden, positions)
        tokens = sample(logits, rows, seen)
        return tokens, cache, _marked(seen, tokens)

    def _logits(self, hidden: Any, positions: Any) -> jax.Array:
        """Returns logits [B, V] in float32 for hidden states [B, D], in the form that reads the LM head fastest."""
        embedding = self._model.backbone.token_embedding
        matrix = lm_head_matmul_weights(embedding, value_in_scope(embedding._embeddings))
        return lm_head_logits(embedding, matrix, hidden, opaque_one(positions))

    def _cache_spec(self, num_rows: int, cache_length: int) -> Any:
        """Returns the shapes and dtypes of the family's KV cache, from its own `_build_cache`."""
        build = self._model._build_cache
        required = [p for p in inspect.signature(build).parameters.values() if p.default is inspect.Parameter.empty]
        token_ids = jax.ShapeDtypeStruct((num_rows, cache_length), jnp.int32)
        return jax.eval_shape(lambda ids: build(ids, *[None] * (len(required) - 1))[1], token_ids)


def decoder_of(model: keras.Model) -> Decoder:
    """Returns the model's Decoder, which is made once so that compiled programs are kept."""
    decoder = getattr(model, "_gemma_tune_decoder", None)
    if decoder is None:
        decoder = Decoder(model)
        object.__setattr__(model, "_gemma_tune_decoder", decoder)
    return decoder


def _marked(seen: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns `seen`, [B, V] bool, with the token of each row, [B], marked."""
    return seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
