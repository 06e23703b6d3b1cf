"""A model that all tests of serving share, and KerasHub's own answers to compare with."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def shared_model():
    """A tiny Gemma 3 that no test changes, so that what is compiled for it serves all of them."""
    from gemma_tune.models.load import load_model

    return load_model("tiny:gemma3")


@pytest.fixture(scope="session")
def keras_hub_greedy():
    """`keras_hub_greedy(model, prompts, num_new)` returns what KerasHub's `generate` answers to each prompt alone.

    All prompts are padded to one length, so that KerasHub compiles once. It generates up to that length; the tokens
    behind the first `num_new` are dropped.
    """

    def answer(model, prompts, num_new):
        length = max(len(prompt) for prompt in prompts) + num_new
        model.compile(sampler="greedy")
        generate = model.make_generate_function()
        found = []
        for prompt in prompts:
            token_ids = np.zeros((1, length), np.int32)
            token_ids[0, : len(prompt)] = prompt
            inputs = {"token_ids": token_ids, "padding_mask": np.arange(length)[None] < len(prompt)}
            outputs = np.asarray(generate(inputs, stop_token_ids=None)["token_ids"])
            found.append(tuple(outputs[0, len(prompt) : len(prompt) + num_new].tolist()))
        return found

    return answer
