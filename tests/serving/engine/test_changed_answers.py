"""Answers of the engine with penalties, bias and grammars: as their rules say, beside others that are left alone."""

import json

import numpy as np
import pytest
from helpers.engine_runs import answers, started, text, tokens

from gemma_tune.serving.decode import decoder_of
from gemma_tune.serving.engine.request import Request
from gemma_tune.serving.logit_changes import LogitChanges
from gemma_tune.serving.prompt_encoder import prompt_encoder_of
from gemma_tune.serving.sampling import Sampling

pytestmark = pytest.mark.slow
PROMPT, NUM_NEW = (2, 17, 300, 45, 800), 24
BOOK = {
    "type": "object",
    "properties": {"title": {"type": "string"}, "shelf": {"type": "integer"}},
    "required": ["title", "shelf"],
}


@pytest.fixture(scope="module")
def plain(shared_model):
    """The greedy answer. Its programs are compiled before the engine counts."""
    return tuple(token for (token,) in decoder_of(shared_model).generate([PROMPT], NUM_NEW, ()))


@pytest.fixture(scope="module")
def engine(shared_model, plain):
    engine = started(shared_model)
    yield engine
    engine.close()


def asked(engine, *changes, **rest):
    requests = [Request(PROMPT, NUM_NEW, changes=each, **rest) for each in changes]
    return [tokens(deltas) for deltas in answers(engine, requests)]


def test_a_huge_frequency_penalty_repeats_nothing_and_is_fresh_for_each_answer(engine, plain):
    """Two answers in turn on the same row: the second begins without the counts of the first."""
    assert len(set(plain)) < NUM_NEW  # The negative control: the plain answer repeats tokens.
    for penalty in (LogitChanges(frequency_penalty=2000.0), LogitChanges(presence_penalty=2000.0)):
        (first,), (second,) = asked(engine, penalty), asked(engine, penalty)
        assert len(set(first)) == NUM_NEW
        assert first == second
        assert first[0] == plain[0]  # Nothing has been said before the first token; the prompt doesn't count.


def test_a_bias_forces_and_forbids(engine, plain):
    forced, forbidden = asked(engine, LogitChanges(bias=((77, 1e4),)), LogitChanges(bias=((plain[0], -1e4),)))
    assert forced == (77,) * NUM_NEW
    assert plain[0] not in forbidden


def test_others_in_the_batch_are_left_alone(engine, plain, shared_model):
    encoder = prompt_encoder_of(shared_model)
    constraint = encoder.grammars.of_json_schema(BOOK)
    free = Request(PROMPT, NUM_NEW)
    requests = [
        free,
        free._replace(constraint=constraint, stop_ids=encoder.stop_ids),
        free._replace(changes=LogitChanges(2.0, 2.0, ((5, 3.0),))),
        free,
    ]
    found = answers(engine, requests)
    assert tokens(found[0]) == tokens(found[3]) == plain
    book = json.loads(text(found[1]))
    assert isinstance(book["title"], str) and isinstance(book["shelf"], int)
    alone = [answers(engine, [request])[0] for request in requests]
    assert [tokens(deltas) for deltas in found] == [tokens(deltas) for deltas in alone]
    assert engine.stats.compilations_since_start == 0


def test_an_answer_ends_where_its_grammar_does(engine, shared_model):
    encoder = prompt_encoder_of(shared_model)
    constraint = encoder.grammars.of_json_schema({"enum": ["red", "green"]})
    seen = set()
    for seed in range(12):
        request = Request(PROMPT, 50, Sampling(temperature=2.0), seed, encoder.stop_ids, constraint=constraint)
        (deltas,) = answers(engine, [request])
        assert deltas[-1].finish_reason == "stop"
        seen.add(json.loads(text(deltas)))
    assert seen == {"red", "green"}


def test_a_grammar_chooses_the_most_likely_allowed_token(engine, shared_model, plain):
    """Where all but two tokens are forbidden, the answer is the likelier of them, token for token."""
    encoder = prompt_encoder_of(shared_model)
    first, second = (encoder.tokenizer.encode(word)[0] for word in ("a", "b"))
    constraint = encoder.grammars.of_rules("start: /[ab]+/")
    (found,) = answers(engine, [Request(PROMPT, 8, constraint=constraint)])
    allowed = np.full(shared_model.backbone.token_embedding.input_dim, -1e4)
    singles = {token for token in range(len(allowed)) if set(encoder.tokenizer.bytes_of(token) or b"-") <= set(b"ab")}
    assert {first, second} <= singles
    bias = tuple((token, 1e3) for token in singles)
    (wanted,) = asked(engine, LogitChanges(bias=bias))
    assert tokens(found) == wanted[:8]
