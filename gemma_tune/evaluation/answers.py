"""Chooses the questions that a model answers, and scores its answers against the wanted ones."""

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from gemma_tune.data import Example
from gemma_tune.data.dedup import hash_text
from gemma_tune.data.example import MODEL_STEPS

# Thai and Lao, Burmese, Khmer, Hiragana and Katakana, and Han, which are written without spaces between words.
_UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e50-\u0e59\u0e81-\u0edf"
    "\u1000-\u1049\u1050-\u109d\u1780-\u17d3\u17d7\u17dc-\u17e9"
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
    "\u3005-\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_INDIAN = "\u0900-\u0963\u0966-\u0dff"  # Devanagari to Sinhala, whose vowel signs aren't in \w.
WORD_PATTERN = rf"[{_UNSPACED}]|(?:[^\W{_UNSPACED}]|[{_INDIAN}])+"  # Regular expression.
_WORD = re.compile(WORD_PATTERN)
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
_RIGHT_F1 = 0.5


class AnswerScore(NamedTuple):
    """Score of an answer against the wanted one, its reference.

    Attributes:
        is_exact: Whether both have the same words; case, spaces and punctuation don't count.
        f1: F1 score of the words that both have in common, as in SQuAD (arXiv:1606.05250).
        is_right: Whether f1 is at least 0.5 and higher than with the reference of any other question.
    """

    is_exact: bool
    f1: float
    is_right: bool


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation.

    In scripts that are written without spaces, such as Chinese, Japanese and Thai, each character counts as a word, as
    in MLQA (arXiv:1910.07475).
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def count_unspaced_characters(text: str) -> int:
    """Returns the number of characters of scripts that are written without spaces between words."""
    return len(_UNSPACED_CHARACTER.findall(text))


def word_f1(answer: str, reference: str) -> float:
    """Returns the F1 score, 0 to 1: the harmonic mean of the shares of their words that answer and reference share."""
    first, second = Counter(words(answer)), Counter(words(reference))
    common = (first & second).total()
    return 2 * common / (first.total() + second.total()) if common else float(not first and not second)


def score_answers(answers: Sequence[str], references: Sequence[str]) -> list[AnswerScore]:
    """Returns the score of each answer, which depends on its own reference and on all others.

    Args:
        answers: Answers of a model.
        references: Wanted answers, in the same order. Equal ones count as the reference of one question.
    """
    topics = list(dict.fromkeys(references))
    scores = []
    for answer, reference in zip(answers, references, strict=True):
        f1 = word_f1(answer, reference)
        best_other = max((word_f1(answer, topic) for topic in topics if topic != reference), default=0.0)
        scores.append(AnswerScore(words(answer) == words(reference), f1, f1 >= _RIGHT_F1 and f1 > best_other))
    return scores


def choose_questions(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Returns at most `count` conversations that end with an answer, in random order, those with new answers first.

    Args:
        examples: Conversations to choose from.
        count: Most conversations to return.
        seed: Random seed of the order.
    """
    answers = {
        i: hash_text(example.answer) for i, example in enumerate(examples) if example.turns[-1].role in MODEL_STEPS
    }
    chats = list(answers)
    random.Random(seed).shuffle(chats)
    first_of_answer = {answers[i]: i for i in reversed(chats)}
    ordered = sorted(chats, key=lambda i: first_of_answer[answers[i]] != i)
    return [examples[i] for i in ordered[:count]]
