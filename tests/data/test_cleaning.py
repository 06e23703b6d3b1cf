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
        ("  a  b \t c  ", "a b c"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("a\x00\x07b\u200b", "ab"),
        ("a \n\n\n\n b", "a\n\n b"),
        ("def f():\n    return  1", "def f():\n    return 1"),  # Indentation stays.
        ("e\u0301", "é"),
        ("a\u00a0b", "a b"),
        ("\x00 \n", ""),
    ],
)
def test_normalize(text, wanted):
    assert normalize(text) == wanted
    assert normalize(wanted) == wanted.strip()


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
        ("How do I reset it?", "how do i   RESET it", True),
        ("Straße!", "STRASSE", True),
        ("e-mail", "e mail", True),
        ("How do I reset it?", "How do I charge it?", False),
        ("?!", "!?", False),
        ("手机", "手機", False),
    ],
)
def test_duplicates_are_found_without_case_spaces_and_punctuation(first, second, equal):
    assert (comparison_key(first) == comparison_key(second)) is equal


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
    assert [each.question_key for each in cleaned] == ["one", "one", "end of turn"]
    assert (cleaner.num_empty, cleaner.num_control_tokens, cleaner.num_duplicates) == (2, 1, 1)


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
        seed=0,
    )
    assert len(splits.train) == 9 and len(splits.heldout) == 2 and splits.report.num_in_heldout == 1
    assert "Question 3?" not in {example.question for example in splits.train}
