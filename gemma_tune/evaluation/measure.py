"""Runs a single model on held-out data: hidden states of the target positions, answers, and the speed of both."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from gemma_tune.data import Batch
from gemma_tune.models.attention.packing_masks import enable_packing
from gemma_tune.models.functional import Params, check_text_only, hidden_states, parameters, params_scope
from gemma_tune.models.restored_layers import restored_layers
from gemma_tune.runtime.backend import keras
from gemma_tune.serving.decode import decoder_of
from gemma_tune.serving.prompt_encoder import Prompt, prompt_encoder_of
from gemma_tune.training.batches import most_targets
from gemma_tune.training.losses.target_positions import gather_targets
from gemma_tune.training.step.compile_once import CompiledOnce

_FIRST_TIMED = 2  # The first token waits for the prefill, and the second may wait for the compiler.


class TargetStates(NamedTuple):
    """Hidden states that predict the target tokens of held-out data.

    Attributes:
        hidden: [T, D] final hidden states of the target positions, in the order of the batches.
        tokens_per_second: Speed of computing them, without padding, compilation and LM head.
    """

    hidden: np.ndarray
    tokens_per_second: float


class TimedAnswers(NamedTuple):
    """Answers and the speed of generating them.

    Attributes:
        texts: Answer to each prompt.
        tokens_per_second: Speed of the decode steps, one answer at a time; None if no answer has three tokens.
    """

    texts: list[str]
    tokens_per_second: float | None


class Targets(NamedTuple):
    """Target tokens of held-out data, in the order of the batches.

    Attributes:
        target_ids: [T] int32 tokens to predict.
        example_ids: [T] number of the example that each belongs to, from 0.
    """

    target_ids: np.ndarray
    example_ids: np.ndarray


def targets_of(batches: Sequence[Batch]) -> Targets:
    """Returns the target tokens of batches, in the order of `target_states`."""
    targets, examples = [], []
    num_rows = 0
    for batch in batches:
        rows, places = np.nonzero(batch.loss_weights)
        targets.append(batch.target_ids[rows, places])
        examples.append((num_rows + rows) * batch.token_ids.shape[1] + batch.segment_ids[rows, places])
        num_rows += len(batch.token_ids)
    _, example_ids = np.unique(np.concatenate(examples), return_inverse=True)
    return Targets(np.concatenate(targets), example_ids)


def target_states(model: keras.Model, batches: Sequence[Batch], advance: Callable[[int], None]) -> TargetStates:
    """Runs a model over batches, and returns the hidden states of their target positions.

    Args:
        model: CausalLM, which is left as it is.
        batches: Batches of one shape.
        advance: Called with the number of target positions computed since the last call.

    Raises:
        ModelError: The model can't run on packed text.
    """
    check_text_only(model)
    num_targets = most_targets(batches)

    def states(params: Params, batch: Batch) -> jax.Array:
        with params_scope(model, params):
            hidden = hidden_states(model.backbone, batch.token_ids, batch.segment_ids, batch.positions)
        return gather_targets(hidden, batch.target_ids, batch.loss_weights, num_targets).hidden

    groups = parameters(model)
    params = {**groups.trainable, **groups.frozen}
    step = CompiledOnce(states)
    with restored_layers(model.backbone):
        enable_packing(model.backbone)
        step.program(params, batches[0])  # Compiles, so that compilation isn't timed.
    parts, num_read, seconds = [], 0, 0.0
    for batch in batches:
        start = time.perf_counter()
        hidden = np.asarray(step(params, batch))
        seconds += time.perf_counter() - start
        count = int(np.count_nonzero(batch.loss_weights))
        parts.append(hidden[:count].copy())
        num_read += int(np.count_nonzero(batch.segment_ids))
        advance(count)
    return TargetStates(np.concatenate(parts), num_read / seconds)


def timed_answers(
    model: keras.Model,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    advance: Callable[[int], None] | None = None,
) -> TimedAnswers:
    """Answers prompts greedily one after the other, at the speed that a single user would see.

    Args:
        model: CausalLM.
        prompts: Questions or conversations.
        max_new_tokens: Most tokens of an answer.
        advance: Called with the number of answers generated since the last call.
    """
    encoder, decoder = prompt_encoder_of(model), decoder_of(model)
    texts, num_timed, seconds = [], 0, 0.0
    for prompt in prompts:
        token_ids: list[int] = []
        arrivals = []
        steps = decoder.generate([encoder.encode(prompt)], max_new_tokens, encoder.stop_ids)
        for (token,) in steps:
            assert token is not None  # There is one row, and the steps end when it does.
            arrivals.append(time.perf_counter())
            token_ids.append(token)
        texts.append(encoder.tokenizer.decode(token_ids).strip())
        timed = arrivals[_FIRST_TIMED - 1 :]
        if len(timed) > 1:
            num_timed += len(timed) - 1
            seconds += timed[-1] - timed[0]
        if advance:
            advance(1)
    return TimedAnswers(texts, num_timed / seconds if num_timed else None)
