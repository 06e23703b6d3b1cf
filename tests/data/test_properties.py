"""Whatever stands in a file: what comes out is an example or an error of ours, and no token gets lost on the way.

Inputs are drawn by hypothesis; a failure prints the smallest input that shows it.
"""

import gzip
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st

from gemma_tune.data.chat_template import template_for
from gemma_tune.data.cleaning import Cleaner, comparison_key, normalize
from gemma_tune.data.example import MODEL_STEPS, Example, Row, TokenizedExample, Turn
from gemma_tune.data.packing import EpochPlan, make_batch, num_positions, plan_rows
from gemma_tune.data.rows.row_options import RowCounter, RowOptions
from gemma_tune.data.sources.readers import read_rows
from gemma_tune.data.sources.row_formats import detect_format, to_examples
from gemma_tune.data.tokenize import tokenize_examples
from gemma_tune.errors import DataError

# Of the same inputs on every machine, in a few seconds each; the files are of each example anew.
PROPERTY = settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

ANY_TEXT = st.text(st.characters(), max_size=30)  # Surrogates too: JSON can say them.
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(ANY_TEXT, inner, max_size=4)),
    max_leaves=12,
)
KEYS = [
    "messages",
    "conversations",
    "instruction",
    "input",
    "context",
    "prompt",
    "question",
    "query",
    "completion",
    "answer",
    "response",
    "output",
    "text",
    "system",
    "tools",
    "label",
    "thinking",
    "chosen",
    "role",
    "content",
    "from",
    "value",
]
ROLES = st.sampled_from(
    ["system", "user", "assistant", "model", "human", "gpt", "User", "tool", "function_call", "system", ""]
)
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": ROLES, "content": st.one_of(ANY_TEXT, ANYTHING)}),
        st.fixed_dictionaries({"from": ROLES, "value": st.one_of(ANY_TEXT, ANYTHING)}),
        ANYTHING,
    ),
    max_size=4,
)
ROWS = st.dictionaries(
    st.one_of(st.sampled_from(KEYS), ANY_TEXT), st.one_of(ANY_TEXT, MESSAGES, ANYTHING), min_size=1, max_size=5
)
TEXT = st.text(max_size=30)
CONVERSATIONS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3).map(
    lambda pairs: Example(
        tuple(turn for asked, said in pairs for turn in (Turn("user", asked), Turn("model", said))), "a"
    )
)


def collected(source):
    """Everything that reading gives: rows, and the errors of single rows; or the one error of the file."""
    errors = []
    try:
        return list(to_examples(read_rows(str(source), "train", errors.append), errors.append)), errors
    except DataError as error:
        return [], [*errors, error]


def check_examples(examples, errors):
    for found in examples:
        assert found.turns and all(isinstance(turn.content, str) for turn in found.turns)
        "".join(turn.content for turn in found.turns).encode()  # A tokenizer can read it.
        assert {turn.role for turn in found.turns} <= {
            "system",
            "tools",
            "user",
            "model",
            "thought",
            "call",
            "tool",
            "text",
        }
    for error in errors:
        str(error).encode()  # It can be printed.


@PROPERTY
@given(st.lists(ROWS, min_size=1, max_size=3))
@example([{"text": "\ud800"}])
def test_any_rows(rows):
    errors, counter = [], RowCounter()
    rows = [Row(row, f"f:{i}") for i, row in enumerate(rows, 1)]
    examples = list(to_examples(rows, errors.append, counter=counter))
    check_examples(examples, errors)
    assert len(examples) + len(errors) + counter.num_dropped == len(rows)


WORDS = st.text("abcdef", min_size=5, max_size=8)
CALL = st.builds(lambda name, word: {"function": {"name": name, "arguments": {"x": word}}}, WORDS, WORDS)
CHAT = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant"]), "content": WORDS}),
        st.fixed_dictionaries({"role": st.just("assistant"), "content": WORDS, "reasoning_content": WORDS}),
        st.fixed_dictionaries({"role": st.just("assistant"), "content": WORDS, "weight": st.sampled_from([0, 1])}),
        st.fixed_dictionaries({"role": st.just("assistant"), "content": st.one_of(st.none(), WORDS), "tool_calls": st.lists(CALL, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"role": st.just("tool"), "name": WORDS, "content": WORDS}),
    ),
    min_size=1,
    max_size=6,
)  # fmt: skip


def words_in(value):
    """Yields every word that somebody wrote in a chat, but for roles and keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from words_in(entry) if key not in ("role", "weight") else ()
    elif isinstance(value, list):
        for entry in value:
            yield from words_in(entry)


@pytest.mark.parametrize("num_draws", [300, 10_000])
def test_every_word_of_a_chat_is_in_the_tokens_or_counted(tiny_tokenizer, num_draws):
    """What isn't there is a question at the end or a thought, and is counted. What is marked is not learnt."""

    @settings(PROPERTY, max_examples=num_draws)
    @given(CHAT, st.sampled_from(["gemma3", "gemma4"]), st.sampled_from(["keep", "mask", "drop"]))
    def check(messages, family, thoughts):
        check_chat(tiny_tokenizer, messages, family, thoughts)

    check()


def check_chat(tiny_tokenizer, messages, family, thoughts):
    errors, counter, template = [], RowCounter(), template_for(family)
    row = Row({"messages": messages}, "f:1")
    examples = list(to_examples([row], errors.append, RowOptions(thoughts=thoughts), counter))
    if errors:
        assert "to learn" in str(errors[0]) or "no user turn" in str(errors[0])
        return
    (tokens,) = tokenize_examples(examples, template, tiny_tokenizer, 4000, "error").examples
    text = template.render(examples[0].turns)
    learnt = tiny_tokenizer.decode(tokens.token_ids[tokens.is_target].tolist())
    end = len(messages)
    while messages[end - 1]["role"] in ("user", "tool", "system"):
        end -= 1
    assert (end < len(messages)) <= ("last_question_dropped" in counter.changes)
    counted = {name for name in counter.changes if name in ("thoughts_dropped", "earlier_thoughts_dropped")}
    for message in messages[:end]:
        thought = message.get("reasoning_content", "")
        for word in words_in({key: value for key, value in message.items() if key != "reasoning_content"}):
            assert word in text
        assert not thought or thought in text or counted
    learnt_words = " ".join(turn.content for turn in examples[0].turns if turn.is_learnt and turn.role in MODEL_STEPS)
    given_words = [word for message in messages if message["role"] != "assistant" for word in words_in(message)]
    assert not [word for word in given_words if word in learnt and word not in learnt_words]
    for turn in examples[0].turns:
        if turn.role == "model" and turn.is_learnt:
            assert turn.content in learnt
    # The tokens are those of the text, up to the last one to learn.
    whole = tiny_tokenizer.encode(text.removeprefix(template.bos))
    assert tokens.token_ids.tolist()[1:] == whole[: len(tokens.token_ids) - 1] and tokens.is_target[-1]


@PROPERTY
@given(st.lists(ROWS, min_size=2, max_size=3))
def test_rows_come_back_from_json_lines(tmp_path, rows):
    """Each row is an example or an error, by its line. One line alone may be a document with several rows."""
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, errors = collected(file)
    check_examples(examples, errors)
    assert len(examples) + len(errors) <= len(rows)  # The others are labelled as bad answers.


JSON_LIKE = st.one_of(
    st.binary(max_size=60),
    st.lists(
        st.sampled_from(
            [b"{", b"}", b"[", b"]", b'"', b":", b",", b'"text"', b'"messages"', b'"role"', b'"user"', b"\\ud800",
             b"\\u0000", b"null", b"1e999", b"9" * 5000, b"[" * 2000, b"\xff", b"\n", b"\r", b"\xef\xbb\xbf", b" ", b"NaN"]
        ),
        max_size=12,
    ).map(b"".join),
)  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.jsonl.gz"])
def test_any_bytes(tmp_path, name):
    @PROPERTY
    @given(JSON_LIKE)
    @example(b"9" * 5000)
    @example(b'{"text": ' + b"9" * 5000 + b"}")
    @example(b"[" * 100_000)
    @example(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff\xff\xff")
    def check(content):
        file = tmp_path / name
        file.write_bytes(content)
        check_examples(*collected(file))

    check()


@PROPERTY
@given(st.binary(min_size=1, max_size=200), st.integers(0, 10**6), st.integers(1, 255))
def test_a_gzip_file_with_a_wrong_byte(tmp_path, content, place, change):
    packed = bytearray(gzip.compress(b'{"text": "' + content.hex().encode() + b'"}\n' * 3))
    packed[place % len(packed)] ^= change
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(packed)
    check_examples(*collected(file))


@PROPERTY
@given(st.text())
@example("\u0958\u200b  x\r\r\n")
def test_normalizing_twice_is_normalizing_once(text):
    once = normalize(text)
    assert normalize(once) == once
    assert comparison_key(comparison_key(once)) == comparison_key(once)


@PROPERTY
@given(st.lists(CONVERSATIONS, max_size=4), st.sampled_from(["gemma3", "gemma4"]), st.integers(4, 60))
def test_all_tokens_are_accounted_for(tiny_tokenizer, examples, family, max_length):
    """Cleaned, rendered, tokenized, packed: what is in the batches is the rendered text of what was kept, and each
    example that is not there was counted.
    """
    template = template_for(family)
    cleaner = Cleaner(template.control_tokens)
    cleaned = [entry.example for entry in cleaner.clean(examples)]
    num_dropped = sum(cleaner.counts.values())
    assert len(cleaned) + num_dropped == len(examples)
    found = tokenize_examples(cleaned, template, tiny_tokenizer, max_length, "drop")
    assert len(found.kept) + found.num_overlong_dropped + found.num_without_target == len(cleaned)
    stored = [found.examples[index] for index in range(len(found.examples))]
    for index, tokens in zip(found.kept, stored, strict=True):
        assert tokens.token_ids[0] == tiny_tokenizer.bos_id
        wanted = tiny_tokenizer.encode(template.render(cleaned[index].turns).removeprefix(template.bos))
        kept_text = list(tokens.token_ids[1:])
        assert wanted[: len(kept_text)] == kept_text
        learnt = [turn.content + template.end_of_turn for turn in cleaned[index].turns if turn.role == "model"]
        wanted = [token for text in learnt for token in tiny_tokenizer.encode(text)]
        assert list(tokens.token_ids[tokens.is_target]) == wanted
    lengths = [num_positions(tokens) for tokens in stored]
    rows = plan_rows(lengths, max_length)
    assert sorted(index for row in rows for index in row) == list(range(len(stored)))
    batch = make_batch([[stored[index] for index in row] for row in rows], len(rows), max_length)
    assert batch.loss_weights.sum() == sum(int(tokens.is_target.sum()) for tokens in stored)
    assert (batch.segment_ids > 0).sum() == sum(lengths)
    for number, row in enumerate(rows):
        for segment, index in enumerate(row, 1):
            here = batch.segment_ids[number] == segment
            assert list(batch.token_ids[number][here]) == list(stored[index].token_ids[:-1])
            assert list(batch.target_ids[number][here]) == list(stored[index].token_ids[1:])
            assert list(batch.positions[number][here]) == list(range(lengths[index]))


@PROPERTY
@given(st.data())
def test_every_epoch_holds_each_example_once(data):
    row_length = data.draw(st.integers(1, 64), "row_length")
    lengths = data.draw(st.lists(st.integers(1, row_length), min_size=1, max_size=80), "lengths")
    packing = data.draw(st.booleans(), "packing")
    plan = EpochPlan(lengths, row_length, packing, seed=data.draw(st.integers(0, 2**31), "seed"))
    for epoch in range(2):
        rows = plan.rows(epoch)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        sums = rows.sums(np.array(lengths))
        assert (sums <= row_length).all()
        if packing and len(rows) > 1:
            # Best fit leaves no two rows that would share one; so all but one are more than half full together.
            assert np.sort(sums)[:2].sum() > row_length
        else:
            assert packing or len(rows) == len(lengths)


def test_every_format_is_met():
    """Control: the drawn rows reach each of the formats, and make examples of each. Which rows hypothesis draws depends
    on the modules that are loaded, so it may draw several times.
    """
    met = set()
    for number in range(20):

        @seed(number)
        @settings(deadline=None, max_examples=300, database=None)
        @given(ROWS)
        def meet(row):
            for found in to_examples([Row(row, "f:1")], lambda error: None):
                del found
                met.add(detect_format(Row(row, "f:1")).name)

        meet()
        if {"text", "instruction", "prompt_completion"} <= met:
            return
    raise AssertionError(f"Met only {met}.")


def test_a_lost_token_would_be_seen():
    """Control: a batch that is laid out a token short has other sums."""
    whole = TokenizedExample(np.arange(5, dtype=np.int32), np.array([False, True, True, True, True]))
    short = TokenizedExample(whole.token_ids[:-1], whole.is_target[:-1])
    sums = [make_batch([[tokens]], 1, 8).loss_weights.sum() for tokens in (whole, short)]
    assert sums == [4, 3]
