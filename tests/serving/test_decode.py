"""Our decoding against KerasHub's own `generate`."""

import numpy as np
import pytest

from gemma_tune.serving.decode import Decoder, decoder_of
from gemma_tune.serving.sampling import Sampling

PROMPTS = ([2, 17, 300, 45, 800], list(range(20, 60)), [2, 5, 9])
NUM_NEW = 12


def rows_of(steps, num_rows):
    rows = [[] for _ in range(num_rows)]
    for tokens in steps:
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows


def keras_hub_greedy(model, prompt, num_new):
    length = len(prompt) + num_new
    token_ids = np.zeros((1, length), np.int32)
    token_ids[0, : len(prompt)] = prompt
    mask = np.arange(length)[None] < len(prompt)
    model.compile(sampler="greedy")
    outputs = model.make_generate_function()({"token_ids": token_ids, "padding_mask": mask}, stop_token_ids=None)
    return np.asarray(outputs["token_ids"])[0, len(prompt) :].tolist()


def test_greedy_equals_keras_hub_token_for_token(tiny, family):
    """Rows of different lengths in one batch, each as KerasHub writes it alone."""
    model = tiny(family)
    ours = rows_of(Decoder(model).generate(PROMPTS, NUM_NEW, stop_ids=()), len(PROMPTS))
    for prompt, row in zip(PROMPTS, ours, strict=True):
        assert row == keras_hub_greedy(model, prompt, NUM_NEW)


def test_a_row_stops_at_a_stop_token_and_others_go_on(tiny):
    model = tiny("gemma3")
    free = rows_of(Decoder(model).generate(PROMPTS, NUM_NEW, stop_ids=()), len(PROMPTS))
    stop = free[0][0]
    stopped = rows_of(Decoder(model).generate(PROMPTS, NUM_NEW, stop_ids=(stop,)), len(PROMPTS))
    assert stopped[0] == []
    for row, whole in zip(stopped, free, strict=True):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)


def test_sampling_is_seeded(tiny):
    model, sampling = tiny("gemma3"), Sampling(temperature=1.5, top_k=50)
    first, again, other = (
        rows_of(decoder_of(model).generate(PROMPTS[:1], NUM_NEW, (), sampling, seed=seed), 1) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_lengths_in_one_bucket_share_a_program(tiny):
    decoder = Decoder(tiny("gemma3"))
    for length in (3, 17, 30):
        list(decoder.generate([list(range(10, 10 + length))], 4, ()))
    assert decoder._prefill._cache_size() == decoder._step._cache_size() == 1


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_every_row_is_answered(tiny, num_rows):
    rows = rows_of(decoder_of(tiny("gemma")).generate(PROMPTS[:num_rows], 3, ()), num_rows)
    assert [len(row) for row in rows] == [3] * num_rows
