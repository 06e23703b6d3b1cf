"""Tokenizing span by span gives the tokens of the whole, with the right ones marked; nothing is emptied silently."""

import numpy as np
import pytest

from gemma_tune.data import Example, Turn, load_examples, template_for
from gemma_tune.data.tokenize import tokenize_examples
from gemma_tune.errors import DataError

EXAMPLES = [
    *load_examples("sample:smartphone_support")[::40],
    Example(
        (
            Turn("user", "Zeile 1\n\nZeile 2 — ünïcode 日本語 🙂"),
            Turn("model", "def f():\n\treturn 1"),
            Turn("user", "x"),
            Turn("model", "y\n\nz"),
        )
    ),
    Example((Turn("system", "S"), Turn("user", "  lead"), Turn("model", "trail  "))),
]


def tokenize_example(example, template, tokenizer):
    return tokenize_examples([example], template, tokenizer, 10_000, "error").examples[0]


def whole_text_ids(example, template, tokenizer):
    """The rendered text in one go, as Hugging Face tokenizes it."""
    return [tokenizer.bos_id, *tokenizer.encode(template.render(example.turns).removeprefix("<bos>"))]


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_spans_give_the_tokens_of_the_whole(tiny_tokenizer, family, example):
    template = template_for(family)
    tokens = tokenize_example(example, template, tiny_tokenizer)
    whole = whole_text_ids(example, template, tiny_tokenizer)
    assert tokens.token_ids.tolist() == whole[: len(tokens.token_ids)]
    assert (
        tiny_tokenizer.decode(whole[len(tokens.token_ids) :]) == "\n"
    )  # Only what nothing is learnt from is left out.


def test_marked_tokens_spell_the_answers(tiny_tokenizer):
    template = template_for("gemma3")
    example = EXAMPLES[-2]
    tokens = tokenize_example(example, template, tiny_tokenizer)
    learnt = tiny_tokenizer.decode(tokens.token_ids[tokens.is_target].tolist())
    assert learnt == "def f():\n\treturn 1<end_of_turn>y\n\nz<end_of_turn>"
    assert not tokens.is_target[0] and tokens.is_target[-1]


def test_documents_begin_with_bos_and_end_with_eos(tiny_tokenizer):
    tokens = tokenize_example(Example((Turn("text", "A document."),)), template_for("gemma3"), tiny_tokenizer)
    assert tokens.token_ids[0] == tiny_tokenizer.bos_id and tokens.token_ids[-1] == tiny_tokenizer.eos_id
    assert tokens.is_target.tolist() == [False] + [True] * (len(tokens.token_ids) - 1)


@pytest.mark.parametrize(("overlong", "num_kept"), [("truncate", 1), ("drop", 0)])
def test_overlong_examples_are_counted(tiny_tokenizer, overlong, num_kept):
    example = Example((Turn("user", "Q"), Turn("model", "word " * 50)), "a:1")
    tokenized = tokenize_examples([example], template_for("gemma3"), tiny_tokenizer, 40, overlong)
    assert len(tokenized.examples) == num_kept
    assert (tokenized.num_truncated, tokenized.num_overlong_dropped) == (num_kept, 1 - num_kept)
    if num_kept:
        assert len(tokenized.examples[0].token_ids) == 41
        whole = tokenize_example(example, template_for("gemma3"), tiny_tokenizer)
        np.testing.assert_array_equal(tokenized.examples[0].token_ids, whole.token_ids[:41])


def test_overlong_examples_can_be_refused(tiny_tokenizer):
    example = Example((Turn("user", "Q"), Turn("model", "word " * 50)), "a.jsonl:7")
    with pytest.raises(DataError, match=r"a.jsonl:7: the example has \d+ tokens, too many for data.max_length=40"):
        tokenize_examples([example], template_for("gemma3"), tiny_tokenizer, 40, "error")


def test_an_example_whose_question_fills_the_row_is_counted_not_kept_empty(tiny_tokenizer):
    example = Example((Turn("user", "word " * 50), Turn("model", "A")))
    tokenized = tokenize_examples([example], template_for("gemma3"), tiny_tokenizer, 20, "truncate")
    assert len(tokenized.examples) == 0 and tokenized.num_without_target == 1 and tokenized.num_truncated == 0
