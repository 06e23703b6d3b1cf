"""Documents in pieces hold each token once; an answer that is cut off isn't learnt as finished; what is lost is counted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.data import DataReport, Example, Turn, template_for
from gemma_tune.data.cleaning import Cleaner
from gemma_tune.data.fit_length import piece_borders
from gemma_tune.data.tokenize import tokenize_examples

TEMPLATE = template_for("gemma3")


def document(text, origin="book.jsonl:1"):
    return Example((Turn("text", text),), origin)


def chat(question, answer):
    return Example((Turn("user", question), Turn("model", answer)), "chats.jsonl:1")


def words(count, seed=0):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(["harbour", "crane", "rope", "tide", "lamp", "gull"], count))


def fitted(examples, tokenizer, max_length, overlong):
    return tokenize_examples(examples, TEMPLATE, tokenizer, max_length, overlong)


@pytest.mark.parametrize("max_length", [24, 50, 128])
def test_the_pieces_of_a_document_hold_each_token_once(tiny_tokenizer, max_length):
    examples = [document(words(7)), document(words(400, 1)), chat("Who?", "I."), document(words(90, 2))]
    found = fitted(examples, tiny_tokenizer, max_length, "chunk")
    assert found.num_cut_up >= 1 and found.num_truncated == found.num_tokens_lost == 0
    for number, example in enumerate(examples):
        pieces = [found.examples[i] for i in np.flatnonzero(found.kept == number)]
        whole = [tiny_tokenizer.bos_id] + [
            token
            for span in TEMPLATE.spans(example.turns)
            for token in ([tiny_tokenizer.eos_id] if span.text == "<eos>" else tiny_tokenizer.encode(span.text))
        ]
        assert all(piece.token_ids[0] == tiny_tokenizer.bos_id for piece in pieces)
        assert all(len(piece.token_ids) <= max_length + 1 for piece in pieces)
        if example.turns[0].role == "text":
            assert [token for piece in pieces for token in piece.token_ids[1:]] == whole[1:]
            assert all(piece.is_target.tolist() == [False] + [True] * (len(piece.token_ids) - 1) for piece in pieces)
            # Only where the document ends does the model learn that it ends.
            ends = [(piece.token_ids == tiny_tokenizer.eos_id).sum() for piece in pieces]
            assert ends == [0] * (len(pieces) - 1) + [1]


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.integers(3, 3000), st.integers(8, 200))
def test_pieces_are_full_but_the_last_two_and_none_is_tiny(length, max_length):
    borders = [1, *piece_borders(length, max_length), length]
    sizes = np.diff(borders)  # Tokens of the document in each piece.
    assert sizes.sum() == length - 1 and sizes.max() <= max_length
    assert len(sizes) == -(-(length - 1) // max_length)  # No more pieces than are needed.
    assert (sizes[:-2] == max_length).all()
    assert len(sizes) == 1 or sizes.min() >= min(2, max_length // 8)


@pytest.mark.parametrize(("overlong", "num_kept"), [("chunk", 4), ("truncate", 1), ("drop", 0)])
def test_what_is_done_with_a_long_document_can_be_chosen(tiny_tokenizer, overlong, num_kept):
    example = document(words(40))
    length = len(fitted([example], tiny_tokenizer, 10_000, "error").examples[0].token_ids)
    max_length = -(-length // 4)
    found = fitted([example], tiny_tokenizer, max_length, overlong)
    assert len(found.examples) == num_kept
    lost = {"chunk": 0, "truncate": length - max_length - 1, "drop": length}[overlong]
    assert found.num_tokens_lost == lost and found.lengths.tolist() == [length]


@pytest.mark.parametrize("overlong", ["chunk", "truncate"])
def test_an_answer_that_is_cut_off_is_not_learnt_as_finished(tiny_tokenizer, overlong):
    end = tiny_tokenizer.encode("<end_of_turn>")
    whole = fitted([chat("Where?", words(30))], tiny_tokenizer, 10_000, "error").examples[0]
    assert whole.token_ids[whole.is_target].tolist()[-1:] == end  # Control: a whole answer is.
    exact = len(whole.token_ids) - 1
    for max_length, is_finished in ((exact, True), (exact - 1, False), (exact // 2, False)):
        found = fitted([chat("Where?", words(30))], tiny_tokenizer, max_length, overlong)
        (tokens,) = found.examples
        learnt = tokens.token_ids[tokens.is_target].tolist()
        assert (learnt[-1:] == end) is is_finished and learnt
        assert found.num_truncated == (not is_finished) and found.num_cut_up == 0
        assert found.num_tokens_lost == exact - max_length


def test_tokens_lost_are_those_that_no_example_holds(tiny_tokenizer):
    examples = [chat("Why?", "So."), chat(words(60), "No room."), chat("Tell me.", words(70)), document(words(80))]
    for overlong in ("chunk", "truncate", "drop"):
        found = fitted(examples, tiny_tokenizer, 40, overlong)
        added = len(found.kept) - len(set(found.kept.tolist()))  # One <bos> for each further piece of a document.
        kept = sum(len(tokens.token_ids) for tokens in found.examples)
        assert kept - added + found.num_tokens_lost == found.lengths.sum()
    assert (found.num_overlong_dropped, found.num_without_target) == (3, 0)
    assert fitted(examples, tiny_tokenizer, 40, "chunk").num_without_target == 1


TEXTS = st.text(max_size=80)
EXAMPLES = st.one_of(
    st.builds(document, TEXTS),
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3).map(
        lambda pairs: Example(
            tuple(turn for asked, said in pairs for turn in (Turn("user", asked), Turn("model", said))), "chats.jsonl:1"
        )
    ),
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(EXAMPLES, min_size=1, max_size=4), st.integers(8, 60), st.sampled_from(["chunk", "truncate", "drop"]))
def test_each_token_of_each_row_is_kept_once_or_counted_as_lost(tiny_tokenizer, examples, max_length, overlong):
    cleaner = Cleaner(TEMPLATE.control_tokens)
    cleaned = [each.example for each in cleaner.clean(examples)]
    assert len(cleaned) + sum(cleaner.counts.values()) == len(examples)
    found = tokenize_examples(cleaned, TEMPLATE, tiny_tokenizer, max_length, overlong)
    num_lost = 0
    for number, example in enumerate(cleaned):
        whole = [tiny_tokenizer.bos_id]
        for span in TEMPLATE.spans(example.turns):
            whole += [tiny_tokenizer.eos_id] if span.text == "<eos>" else tiny_tokenizer.encode(span.text)
        whole = whole[: found.lengths[number]]  # Behind the last token to learn, the template has a line feed.
        pieces = [found.examples[i].token_ids.tolist() for i in np.flatnonzero(found.kept == number)]
        held = [tiny_tokenizer.bos_id, *(token for piece in pieces for token in piece[1:])] if pieces else []
        assert held == whole[: len(held)]
        num_lost += len(whole) - len(held)
        assert len(held) == len(whole) or overlong != "chunk" or example.turns[0].role != "text"
    assert found.num_tokens_lost == num_lost


def test_the_summary_says_what_is_lost():
    report = DataReport(
        num_rows=50, num_empty=2, num_without_target=1, num_train=40, num_heldout=7, num_tokens_lost=300, longest_lost=151,
        lengths=np.full(100, 30, np.int32),
    )  # fmt: skip
    assert report.summary() == (
        "40 examples for training, 7 held out. Dropped: 2 empty, 1 no answer fits. 300 of 3,000 tokens (10.0%) are cut "
        "off or dropped because examples are too long. --max_length=150 loses none."
    )
    assert report.loses_much
    assert DataReport(num_rows=9, num_train=8, num_heldout=1).summary() == "8 examples for training, 1 held out."
    assert not DataReport(num_rows=9, num_train=8, num_heldout=1).loses_much
