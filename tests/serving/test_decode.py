"""The Decoder against KerasHub's own `generate`."""

import logging

import jax
import pytest

from gemma_tune.models.functional import parameters
from gemma_tune.serving.decode import Decoder, decoder_of
from gemma_tune.serving.engine.stats import num_compilations
from gemma_tune.serving.sampling import Sampling

PROMPTS = ((2, 17, 300, 45, 800), tuple(range(20, 60)), (2, 5, 9))
NUM_NEW = 12


def rows_of(steps, num_rows):
    rows = [[] for _ in range(num_rows)]
    for tokens in steps:
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return [tuple(row) for row in rows]


@pytest.fixture(scope="module")
def free(shared_model):
    """The rows of PROMPTS without stop tokens."""
    return rows_of(decoder_of(shared_model).generate(PROMPTS, NUM_NEW, stop_ids=()), len(PROMPTS))


def test_greedy_equals_keras_hub_token_for_token(shared_model, free, keras_hub_greedy):
    """Rows of different lengths in one batch, each as KerasHub generates it alone."""
    assert free == keras_hub_greedy(shared_model, PROMPTS, NUM_NEW)


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma4"])
def test_greedy_equals_keras_hub_in_every_family(tiny, family, keras_hub_greedy):
    model = tiny(family)
    rows = rows_of(decoder_of(model).generate(PROMPTS, NUM_NEW, stop_ids=()), len(PROMPTS))
    assert rows == keras_hub_greedy(model, PROMPTS, NUM_NEW)


def test_a_row_stops_at_a_stop_token_and_others_go_on(shared_model, free):
    stop = free[0][0]
    stopped = rows_of(decoder_of(shared_model).generate(PROMPTS, NUM_NEW, stop_ids=(stop,)), len(PROMPTS))
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    assert stopped[0] == () and any(stopped)


def test_sampling_is_seeded(shared_model):
    sampling = Sampling(temperature=1.5, top_k=50)
    first, again, other = (
        rows_of(decoder_of(shared_model).generate(PROMPTS[:1], NUM_NEW, (), sampling, seed=seed), 1)
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_lengths_in_one_bucket_share_a_program(shared_model):
    decoder = Decoder(shared_model)
    list(decoder.generate([list(range(10, 13))], 4, ()))
    compiled = num_compilations()
    for length in (17, 30):
        list(decoder.generate([list(range(10, 10 + length))], 4, ()))
    assert num_compilations() == compiled
    list(decoder.generate([list(range(10, 50))], 4, ()))  # The next bucket, as a negative control.
    assert num_compilations() > compiled


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_step_is_compiled_once(shared_model, caplog, is_committed):
    """Also with arrays that are committed to their device, as those of a model in training are."""
    groups = parameters(shared_model)
    params = {**groups.trainable, **groups.frozen}
    if is_committed:
        params = {path: jax.device_put(value, jax.devices()[0]) for path, value in params.items()}
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        list(Decoder(shared_model).generate(PROMPTS, 4, (), params=params))
    compiled = [
        name for name in ("_prefill_fn", "_step_fn") for _ in range(caplog.text.count(f"Compiling jit({name})"))
    ]
    assert compiled == ["_prefill_fn", "_step_fn"]


def test_a_repeated_token_is_made_less_likely_from_the_first_one_on(shared_model, free):
    """The token that the prefill gives counts as seen too."""
    sampling = Sampling(repetition_penalty=1e6)
    rows = rows_of(decoder_of(shared_model).generate(PROMPTS, NUM_NEW, (), sampling), len(PROMPTS))
    assert all(
        len(set(row)) == NUM_NEW and not set(row) & set(prompt) for row, prompt in zip(rows, PROMPTS, strict=True)
    )
    assert any(len(set(row)) < NUM_NEW for row in free), "without a penalty some token occurs twice"


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_every_row_is_answered(shared_model, num_rows):
    rows = rows_of(decoder_of(shared_model).generate(PROMPTS[:num_rows], 3, ()), num_rows)
    assert [len(row) for row in rows] == [3] * num_rows
