"""What one model makes of held-out data: final hidden states where it is scored, answers, and how fast."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_tune.data import Batch
from gemma_tune.models.attention.packing_masks import enable_packing
from gemma_tune.models.functional import Params, check_text_only, hidden_states, parameters, params_scope
from gemma_tune.runtime.backend import keras
from gemma_tune.serving.decode import decoder_of
from gemma_tune.serving.prompt_encoder import Prompt, prompt_encoder_of
from gemma_tune.training.batches import most_targets
from gemma_tune.training.step.compile_once import CompiledOnce

_FIRST_TIMED = 2  # The first token waits for the prompt, the second perhaps for the compiler.


class ScoredStates(NamedTuple):
    """hidden: [T, D] final hidden states of the scored positions, in the order of the batches.

    tokens_per_second: Read while making them; padding and compiling don't count, nor does the head.
    """

    hidden: np.ndarray
    tokens_per_second: float


class TimedAnswers(NamedTuple):
    """texts: Of each prompt. tokens_per_second: Written one answer at a time; None if none was longer than two."""

    texts: list[str]
    tokens_per_second: float | None


class ScoredPositions(NamedTuple):
    """target_ids: [T] int32. example_ids: [T] which example each belongs to, counted from 0."""

    target_ids: np.ndarray
    example_ids: np.ndarray


def scored_positions(batches: Sequence[Batch]) -> ScoredPositions:
    """Returns the positions with a loss weight, in the order of `scored_states`."""
    targets, examples = [], []
    num_rows = 0
    for batch in batches:
        rows, places = np.nonzero(batch.loss_weights)
        targets.append(batch.target_ids[rows, places])
        examples.append((num_rows + rows) * batch.token_ids.shape[1] + batch.segment_ids[rows, places])
        num_rows += len(batch.token_ids)
    _, example_ids = np.unique(np.concatenate(examples), return_inverse=True)
    return ScoredPositions(np.concatenate(targets), example_ids)


def scored_states(model: keras.Model, batches: Sequence[Batch], advance: Callable[[int], None]) -> ScoredStates:
    """Runs a model over batches.

    Args:
        model: A CausalLM.
        batches: Of one shape.
        advance: Called with how many more positions are done.

    Raises:
        ModelError: The model doesn't run on packed text.
    """
    check_text_only(model)
    enable_packing(model.backbone)
    num_targets = most_targets(batches)

    def states(params: Params, batch: Batch) -> jax.Array:
        with params_scope(model, params):
            hidden = hidden_states(model.backbone, batch.token_ids, batch.segment_ids, batch.positions)
        (chosen,) = jnp.nonzero(batch.loss_weights.reshape(-1), size=num_targets, fill_value=0)
        return hidden.reshape(-1, hidden.shape[-1])[chosen]

    groups = parameters(model)
    params = {**groups.trainable, **groups.frozen}
    step = CompiledOnce(states)
    step.memory(params, batches[0])  # Compiles, so that the clock sees computing alone.
    parts, num_read, seconds = [], 0, 0.0
    for batch in batches:
        start = time.perf_counter()
        hidden = np.asarray(step(params, batch))
        seconds += time.perf_counter() - start
        count = int(np.count_nonzero(batch.loss_weights))
        parts.append(hidden[:count].copy())
        num_read += int(np.count_nonzero(batch.segment_ids))
        advance(count)
    return ScoredStates(np.concatenate(parts), num_read / seconds)


def timed_answers(
    model: keras.Model,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    advance: Callable[[int], None] | None = None,
) -> TimedAnswers:
    """Answers greedily, one prompt after the other, as a single user would see it.

    Args:
        model: A CausalLM.
        prompts: Questions or conversations.
        max_new_tokens: Longest answer.
        advance: Called with how many more answers are done.
    """
    encoder, decoder = prompt_encoder_of(model), decoder_of(model)
    texts, num_timed, seconds = [], 0, 0.0
    for prompt in prompts:
        made: list[int] = []
        arrivals = []
        steps = decoder.generate([encoder.encode(prompt)], max_new_tokens, encoder.stop_ids)
        for (token,) in steps:
            assert token is not None  # The only row: the steps end when it stops.
            arrivals.append(time.perf_counter())
            made.append(token)
        texts.append(encoder.tokenizer.decode(made).strip())
        timed = arrivals[_FIRST_TIMED - 1 :]
        if len(timed) > 1:
            num_timed += len(timed) - 1
            seconds += timed[-1] - timed[0]
        if advance:
            advance(1)
    return TimedAnswers(texts, num_timed / seconds if num_timed else None)
