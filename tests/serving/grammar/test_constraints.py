"""Grammars, followed by a model that draws any allowed token: nothing but the grammar keeps its answers in form."""

import json
import random
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from gemma_tune.data import template_for
from gemma_tune.errors import ConfigError
from gemma_tune.models.load import load_tokenizer
from gemma_tune.serving.grammar.closing import allowed_tokens
from gemma_tune.serving.prompt_encoder import PromptEncoder

BOOK = {
    "type": "object",
    "properties": {"title": {"type": "string"}, "shelf": {"type": "integer", "minimum": 1, "maximum": 40}},
    "required": ["title", "shelf"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def encoder():
    tokenizer, family = load_tokenizer("tiny")
    return PromptEncoder(tokenizer, template_for(family))


def drawn(encoder, constraint, max_tokens, seed, wish=None):
    """An answer of tokens drawn uniformly from the allowed ones; (text, whether it was cut short).

    wish: Text that is drawn token by token before, whatever is allowed.
    """
    rng, state, tokens = np.random.default_rng(seed), constraint.begin(max_tokens), []
    wished = encoder.tokenizer.encode(wish or "")
    for _ in range(max_tokens):
        choices = np.flatnonzero(allowed_tokens(state.matcher)[: encoder.tokenizer.vocabulary_size])
        token = state.advance(wished.pop(0) if wished else int(rng.choice(choices)))
        assert not state.error
        if token is None or token in encoder.stop_ids:
            break
        tokens.append(token)
        if state.is_complete:
            break
    return encoder.tokenizer.decode(tokens), state.was_cut_short


@pytest.mark.parametrize("max_tokens", [24, 60, 400])
def test_answers_are_valid_also_where_tokens_run_out(encoder, max_tokens):
    constraint, cut_short = encoder.grammars.of_json_schema(BOOK), 0
    for seed in range(20):
        text, was_cut_short = drawn(encoder, constraint, max_tokens, seed)
        jsonschema.validate(json.loads(text), BOOK)
        cut_short += was_cut_short
    assert cut_short or max_tokens == 400


def test_an_answer_with_room_for_all_of_it_is_left_alone(encoder):
    constraint = encoder.grammars.of_json_schema(BOOK)
    wish = '{"title":"Emma, and more books of the same kind","shelf":4}'
    length = len(encoder.tokenizer.encode(wish))
    for max_tokens in (length + 16, 100):
        assert drawn(encoder, constraint, max_tokens, 0, wish) == (wish, False)
    text, was_cut_short = drawn(encoder, constraint, length - 4, 0, wish)
    assert was_cut_short and text.startswith('{"title":"Emma')
    jsonschema.validate(json.loads(text), BOOK)


def test_fewer_tokens_than_the_shortest_answer_has_are_no_error(encoder):
    text, was_cut_short = drawn(encoder, encoder.grammars.of_json_schema(BOOK), 2, 0)
    assert not was_cut_short
    with pytest.raises(ValueError):
        json.loads(text)


def test_forty_different_schemas(encoder, monkeypatch):
    """benchmarks/structured.py asks 200 of the engine, at night in tests/benchmarks too."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    from benchmarks.json_schemas import random_schema

    rng = random.Random(3)
    for seed in range(40):
        schema = random_schema(rng)
        text, _ = drawn(encoder, encoder.grammars.of_json_schema(schema), 400, seed)
        jsonschema.validate(json.loads(text), schema)


def test_control_tokens_are_no_text(encoder):
    """Within a JSON text nearly everything may come next, but not what marks a turn."""
    state = encoder.grammars.of_json_schema({"type": "string"}).begin(50)
    for token in encoder.tokenizer.encode('"a'):
        state.advance(token)
    allowed = allowed_tokens(state.matcher)[: encoder.tokenizer.vocabulary_size]
    assert allowed.sum() > 900
    names = ["<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>"]
    special = [encoder.tokenizer.id_of(name) for name in names]
    assert not allowed[[*special, encoder.tokenizer.bos_id, encoder.tokenizer.eos_id, encoder.tokenizer.pad_id]].any()


def test_the_end_is_allowed_where_the_answer_is_complete_alone(encoder):
    state = encoder.grammars.of_json_schema({"type": "integer"}).begin(50)
    assert not allowed_tokens(state.matcher)[list(encoder.stop_ids)].any()
    state.advance(encoder.tokenizer.encode("4")[0])
    assert allowed_tokens(state.matcher)[list(encoder.stop_ids)].all()


def test_a_grammar_is_compiled_once(encoder):
    first = encoder.grammars.of_json_schema(BOOK)
    assert encoder.grammars.of_json_schema(dict(BOOK)) is first
    assert encoder.grammars.of_json_schema({"type": "null"}) is not first


@pytest.mark.parametrize(
    ("schema", "words"),
    [({"type": "cat"}, "cat"), ({"type": "array", "uniqueItems": True}, "uniqueItems"), ({"minimum": "a"}, "")],
)
def test_what_a_grammar_cannot_say_is_an_error(encoder, schema, words):
    with pytest.raises(ConfigError, match=words):
        encoder.grammars.of_json_schema(schema)


def test_without_llguidance_it_is_said_what_to_install(encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    fresh = PromptEncoder(encoder.tokenizer, encoder.template)
    with pytest.raises(ConfigError, match=r"pip install 'gemma-tune\[serve\]'"):
        fresh.grammars.of_json_schema(BOOK)
