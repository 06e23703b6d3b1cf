"""Which questions are answered, and how near written answers come to the wanted ones."""

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from gemma_tune.data import Example
from gemma_tune.data.dedup import hash_text

_WORD = re.compile(r"\w+")
_RIGHT_F1 = 0.5


class AnswerScore(NamedTuple):
    """One answer against the wanted one.

    Attributes:
        is_exact: Equal when case, spaces and punctuation don't count.
        f1: Of the words that both have (as SQuAD counts, arXiv:1606.05250).
        is_right: The answer is the wanted one rather than any other question's: no other reference has a higher f1, and
            f1 is at least 0.5.
    """

    is_exact: bool
    f1: float
    is_right: bool


def words(text: str) -> list[str]:
    """Returns a text's words, without case and punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def word_f1(answer: str, reference: str) -> float:
    """Returns the harmonic mean of the shares of words that answer and reference have in common; 0 to 1."""
    first, second = Counter(words(answer)), Counter(words(reference))
    common = (first & second).total()
    return 2 * common / (first.total() + second.total()) if common else float(not first and not second)


def score_answers(answers: Sequence[str], references: Sequence[str]) -> list[AnswerScore]:
    """Scores each answer against its reference, and against all others.

    Args:
        answers: What a model wrote.
        references: What was wanted, in the same order. Equal references are one topic.
    """
    topics = list(dict.fromkeys(references))
    scores = []
    for answer, reference in zip(answers, references, strict=True):
        f1 = word_f1(answer, reference)
        best_other = max((word_f1(answer, topic) for topic in topics if topic != reference), default=0.0)
        scores.append(AnswerScore(words(answer) == words(reference), f1, f1 >= _RIGHT_F1 and f1 > best_other))
    return scores


def choose_questions(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Returns conversations that end with an answer, at most `count`, in a fixed random order, those with new answers
    first.
    """
    answers = {i: hash_text(example.answer) for i, example in enumerate(examples) if example.turns[-1].role == "model"}
    chats = list(answers)
    random.Random(seed).shuffle(chats)
    first_of_answer = {answers[i]: i for i in reversed(chats)}
    ordered = sorted(chats, key=lambda i: first_of_answer[answers[i]] != i)
    return [examples[i] for i in ordered[:count]]
