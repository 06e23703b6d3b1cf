"""Normalising, duplicates, and a split that lets no held-out question into training."""

import random

import numpy as np
import pytest

from gemma_tune.data import Example, Turn, load_splits
from gemma_tune.data.cleaning import Cleaner, comparison_key, normalize
from gemma_tune.data.heldout_split import heldout_by_question, question_hash

CONTROL = ("<end_of_turn>", "<start_of_turn>")


def chat(question, answer="A", *more):
    return Example((Turn("user", question), Turn("model", answer), *more))


def split_by_question(examples, fraction, seed):
    hashes = [question_hash(comparison_key(example.question), seed) for example in examples]
    is_heldout = heldout_by_question(np.array(hashes, np.uint64), fraction)
    return (
        [example for example, held in zip(examples, is_heldout, strict=True) if held == wanted]
        for wanted in (False, True)
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  a  b \t c  ", "a  b \t c"),  # Aligned columns of a table.
        ("a\r\nb\rc", "a\nb\nc"),
        ("one\n\n\n\ntwo", "one\n\n\n\ntwo"),
        ("def f():\n    return  1  # two", "def f():\n    return  1  # two"),
        ("Roses are red,  \nviolets blue.  ", "Roses are red,  \nviolets blue."),  # Markdown's hard line break.
        ("e\u0301", "é"),
        ("x² ﬁ ①", "x² ﬁ ①"),  # Compatibility forms are other characters.
        ("10\u00a0km", "10\u00a0km"),
        ("👩\u200d🚀 می\u200cخواهم", "👩\u200d🚀 می\u200cخواهم"),  # Joiners are part of the writing.
        ("\x1b[1mbold\x1b[0m\x0cnext page", "\x1b[1mbold\x1b[0m\x0cnext page"),
        ("\ufeff text \u200b", "text"),
        ("\x00 \n\u2003\u200b", ""),
    ],
)
def test_text_stays_as_it_is_but_for_what_no_reader_sees(text, wanted):
    assert normalize(text) == wanted
    assert normalize(wanted) == wanted


@pytest.mark.parametrize("seed", range(3))
def test_short_cuts_for_plain_text_change_nothing(seed):
    """A letter that keeps a text from the short cuts, put behind it and taken away again, changes nothing else."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(2000):
        text = "".join(rng.choices("ab C_-.,!?\t\n\r\x00 ", k=rng.randrange(12)))
        text += "z"  # Else white space before the letter would be inside and not at the end.
        assert normalize(text) == normalize(text + "é").removesuffix("é")
        assert comparison_key(text) == comparison_key(text + "é").removesuffix("é")


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("How do I reset it?", "how do i   RESET\nit", True),
        ("Straße!", "STRASSE", True),
        ("Où est la gare ?", "où est la gare", True),
        ("电池怎么换？", "电池怎么换。", True),
        ("Ends here...", "ends here", True),
        ("e\u0301te\u0301", "ÉTÉ", True),
        ("e-mail", "e mail", False),
        ("How do I reset it?", "How do I charge it?", False),
        ("?!", "!?", False),
        ("手机", "手機", False),
        ("Is F# like F++?", "Is F like F?", False),
        ("a <= b", "a >= b", False),
        ("3 - 5", "-3 + 5", False),
        ("I won 🏆", "I won 🥈", False),
        ("x²", "x2", False),
        ("snake_case", "snake case", False),
        (".5", "5", False),
        ("It costs 10%", "It costs 10", False),
    ],
)
def test_case_spaces_and_final_punctuation_make_no_difference_and_nothing_else(first, second, equal):
    assert (comparison_key(first) == comparison_key(second)) is equal


SIGNS = [
    ("Does F++ have pointers?", "Yes."), ("Does F have pointers?", "Yes."), ("Does F# have pointers?", "Yes."),
    ("7 - 2 =", "5"), ("-7 + 2 =", "5"), ("a <= b?", "True"), ("a >= b?", "True"),
    ("Feeling 🥶", "ok"), ("Feeling 🥵", "ok"), ("What is the rent?", "Nine euros."), ("what  is the RENT", "nine euros"),
]  # fmt: skip


@pytest.mark.parametrize(("dedup", "num_kept"), [("normalized", 10), ("exact", 11), ("none", 12)])
def test_what_counts_as_a_duplicate_can_be_chosen(dedup, num_kept):
    examples = [chat(*pair) for pair in [*SIGNS, SIGNS[0]]]
    cleaner = Cleaner(CONTROL, dedup=dedup)
    kept = [each.example for each in cleaner.clean(examples)]
    assert len(kept) == num_kept and cleaner.counts["duplicates"] == 12 - num_kept
    assert kept[:10] == examples[:10]


def test_clean_counts_what_it_drops():
    examples = [
        chat("One?"),
        chat("one", "a!"),
        chat("one", "B"),
        chat("  "),
        chat("Two", ""),
        chat("x <end_of_turn>"),
        Example((Turn("text", "<end_of_turn>"),)),
    ]
    cleaner = Cleaner(CONTROL)
    cleaned = [*cleaner.clean(examples[:1]), *cleaner.clean(examples[1:])]  # Duplicates are known across chunks.
    assert [each.example.question for each in cleaned] == ["One?", "one", "<end_of_turn>"]
    assert [each.question_key for each in cleaned] == ["one", "one", "<end_of_turn>"]
    assert cleaner.counts == {"empty": 2, "control_tokens": 1, "duplicates": 1, "near_duplicates": 0}
    assert [sample.text for sample in cleaner.samples["duplicates"]] == ["user: one\nmodel: a!"]
    assert len(cleaner.samples["empty"]) == 2


def test_a_system_prompt_goes_before_conversations_without_one():
    own = Example((Turn("system", "mine"), Turn("user", "Q"), Turn("model", "A")))
    cleaned = Cleaner(CONTROL, "S").clean([chat("Q2"), own, Example((Turn("text", "T"),))])
    first, second, document = (each.example for each in cleaned)
    assert first.turns[0] == Turn("system", "S")
    assert second.turns[0] == Turn("system", "mine")
    assert document.turns == (Turn("text", "T"),)


@pytest.mark.parametrize("seed", range(3))
def test_the_split_stays_put_when_data_grows(seed):
    few = [chat(f"question {i}") for i in range(300)]
    many = few + [chat(f"another {i}") for i in range(300)]
    random.Random(seed).shuffle(many)
    held_few, held_many = (
        {example.question for example in list(split_by_question(part, 0.2, seed))[1]} for part in (few, many)
    )
    assert held_few == {question for question in held_many if question.startswith("question")}
    # 300 draws with p = 0.2: mean 60, standard deviation 7; five of them.
    assert 25 <= len(held_few) <= 95
    assert list(split_by_question(few, 0.2, seed + 10)) != list(split_by_question(few, 0.2, seed))


@pytest.mark.parametrize("seed", range(20))
def test_no_heldout_question_nor_a_duplicate_is_in_training(seed):
    rng = random.Random(seed)
    ways = (str.upper, str.title, lambda q: q + "!", lambda q: "  " + q.replace(" ", "   "), lambda q: q)
    examples = [chat(rng.choice(ways)(f"question number {rng.randrange(40)}"), f"answer {i}") for i in range(200)]
    train, heldout = split_by_question(examples, 0.3, seed)
    assert train and heldout and len(train) + len(heldout) == len(examples)
    assert not {comparison_key(e.question) for e in train} & {comparison_key(e.question) for e in heldout}


def test_small_data_still_holds_something_out():
    train, heldout = split_by_question([chat("a"), chat("b"), chat("c")], 0.01, 0)
    assert (len(train), len(heldout)) == (2, 1)
    assert heldout_by_question(np.array([7, 7], np.uint64), 0.5).tolist() == [False, False]
    assert heldout_by_question(np.empty(0, np.uint64), 0.5).tolist() == []


def test_an_eval_source_of_its_own_takes_its_questions_out_of_training(write):
    train = write("train.jsonl", "".join(f'{{"prompt": "Question {i}?", "completion": "A"}}\n' for i in range(10)))
    heldout = write(
        "heldout.jsonl", '{"prompt": "question 3", "completion": "other"}\n{"prompt": "new", "completion": "A"}\n'
    )
    splits = load_splits(
        str(train),
        CONTROL,
        eval_source=str(heldout),
        split="train",
        eval_split="",
        eval_fraction=0.1,
        system_prompt="",
        on_error="raise",
        dedup="normalized",
        near_dedup_threshold=0.0,
        seed=0,
    )
    assert len(splits.train) == 9 and len(splits.heldout) == 2 and splits.report.num_in_heldout == 1
    assert "Question 3?" not in {example.question for example in splits.train}
