"""Metrics that compare the words and characters of an answer with those of the wanted one.

exact_match and f1 are SQuAD's (arXiv:1606.05250), for any alphabet. ROUGE (Lin 2004) is that of the package
rouge-score, without stemming; as there, an underscore separates words, which it doesn't for the other metrics. BLEU
(Papineni et al. 2002) and chrF (Popović 2015) are sacrebleu's (Post 2018), of the whole corpus. BLEU is that of its
`effective_order=True`: lengths of n-grams that no answer has don't count, as sacrebleu does for single sentences. It
differs from sacrebleu's default where all answers are shorter than four words: there that is 0.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemma_tune.errors import ConfigError
from gemma_tune.evaluation.answers import score_answers, word_f1, words
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.metric import Metric, mean_statistics

_BLEU_ORDERS = 4
_CHRF_ORDERS, _CHRF_BETA = 6, 2.0
_EXTRA = "pip install 'gemma-tune[eval]'"


def needs_references(cases: Sequence[EvalCase]) -> str:
    """Returns why a metric that compares with wanted answers doesn't suit the cases; '' if it does."""
    return "" if any(case.reference for case in cases) else "no question has a wanted answer."


def _compared(score: Callable[[str, str], float]) -> Callable[[Sequence[EvalCase], Sequence[str]], np.ndarray]:
    """Returns the statistics of the mean score of (answer, reference). Rows without a reference don't count."""

    def statistics(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
        rows = zip(cases, answers, strict=True)
        return mean_statistics([score(answer, case.reference) if case.reference else None for case, answer in rows])

    return statistics


def _is_exact(answer: str, reference: str) -> bool:
    return words(answer) == words(reference)


def _right_answers(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
    rows = [row for row, case in enumerate(cases) if case.reference]
    scores = score_answers([answers[row] for row in rows], [cases[row].reference for row in rows])
    is_right: list[float | None] = [None] * len(cases)
    for row, score in zip(rows, scores, strict=True):
        is_right[row] = float(score.is_right)
    return mean_statistics(is_right)


def _has_few_references(cases: Sequence[EvalCase]) -> str:
    distinct = len({case.reference for case in cases if case.reference})
    return needs_references(cases) or (
        "all wanted answers are the same: there is no other one to be nearer to." if distinct < 2 else ""
    )


def _rouge(kind: str) -> Callable[[str, str], float]:
    def score(answer: str, reference: str) -> float:
        return _rouge_scorer(kind).score(reference, answer)[kind].fmeasure

    return score


@functools.cache
def _rouge_scorer(kind: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(f"The metric {kind} needs the package rouge-score. Run: {_EXTRA}") from error
    return RougeScorer([kind], use_stemmer=False, tokenizer=_WordTokenizer())


class _WordTokenizer:
    """Words in any alphabet. The package's own keeps a to z and 0 to 9 alone, so that Hindi would score 0."""

    def tokenize(self, text: str) -> list[str]:
        return words(text.replace("_", " "))


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise ConfigError(f"The metrics bleu and chrf need the package sacrebleu. Run: {_EXTRA}") from error
    return sacrebleu


def _bleu_statistics(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
    """Returns [n, 10]: lengths of answer and reference, then matches and n-grams of the answer for n from 1 to 4."""
    bleu = _sacrebleu().BLEU(effective_order=True)
    found = np.zeros((len(cases), 2 + 2 * _BLEU_ORDERS))
    for row, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        if case.reference:
            score = bleu.sentence_score(answer, [case.reference])
            found[row] = [score.sys_len, score.ref_len, *score.counts, *score.totals]
    return found


def bleu_figure(sums: np.ndarray) -> np.ndarray:
    """Returns BLEU, 0 to 100, with sacrebleu's exponential smoothing and effective order.

    Args:
        sums: [..., 10] sums of statistics.
    """
    lengths, references = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + _BLEU_ORDERS], sums[..., 2 + _BLEU_ORDERS :]
    has_order = totals > 0
    # The k-th order without a match counts as if it had 1 / 2^k of one.
    is_smoothed = has_order & (matches == 0)
    smoothed = 1 / 2.0 ** np.cumsum(is_smoothed, axis=-1)
    precisions = np.where(is_smoothed, smoothed, matches) / np.maximum(totals, 1)
    logs = np.where(has_order, np.log(np.maximum(precisions, 1e-300)), 0.0)
    mean_log = logs.sum(-1) / np.maximum(has_order.sum(-1), 1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        brevity = np.where(lengths < references, np.exp(1 - references / lengths), 1.0)
    figure = 100 * np.where(lengths > 0, brevity, 0.0) * np.exp(mean_log)
    return np.where(matches.any(-1), figure, np.where(references > 0, 0.0, np.nan))


def _chrf_statistics(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
    """Returns [n, 18]: for n from 1 to 6, character n-grams of the answer, of the reference, and those they share."""
    found = np.zeros((len(cases), 3 * _CHRF_ORDERS))
    for row, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        if case.reference:
            # As in sacrebleu, white space doesn't count.
            texts = ["".join(text.split()) for text in (answer, case.reference)]
            for order in range(1, _CHRF_ORDERS + 1):
                first, second = (_ngrams(text, order) for text in texts)
                shared = (first & second).total()
                total = second.total()
                # sacrebleu leaves out the answer's n-grams where the reference is too short to have any.
                found[row, 3 * order - 3 : 3 * order] = (first.total() if total else 0, total, shared)
    return found


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))


def chrf_figure(sums: np.ndarray) -> np.ndarray:
    """Returns chrF2, 0 to 100: F with recall counting twice as much, of the mean precision and recall over the orders.

    Args:
        sums: [..., 18] sums of statistics.
    """
    by_order = sums.reshape(*sums.shape[:-1], _CHRF_ORDERS, 3)
    answers, references, shared = by_order[..., 0], by_order[..., 1], by_order[..., 2]
    counts = (answers > 0) & (references > 0)
    number = np.maximum(counts.sum(-1), 1)
    precision = np.where(counts, shared / np.maximum(answers, 1), 0.0).sum(-1) / number
    recall = np.where(counts, shared / np.maximum(references, 1), 0.0).sum(-1) / number
    factor = _CHRF_BETA**2
    bottom = factor * precision + recall
    figure = 100 * (1 + factor) * precision * recall / np.where(bottom > 0, bottom, 1.0)
    return np.where(references.any(-1), figure, np.nan)


TEXT_METRICS = (
    Metric("exact_match", "share of answers with the same words as the wanted one", _compared(_is_exact),
           problem=needs_references),
    Metric("f1", "F1 score of the words that answer and wanted answer share", _compared(word_f1),
           problem=needs_references),
    Metric("right_answer", "share of answers nearer to the wanted one than to any other question's, with F1 >= 0.5",
           _right_answers, problem=_has_few_references),
    Metric("rouge1", "ROUGE-1: F1 of single words", _compared(_rouge("rouge1")), problem=needs_references),
    Metric("rouge2", "ROUGE-2: F1 of pairs of words", _compared(_rouge("rouge2")), problem=needs_references),
    Metric("rougeL", "ROUGE-L: F1 of the longest common subsequence of words", _compared(_rouge("rougeL")),
           problem=needs_references),
    Metric("bleu", "BLEU of all answers, 0 to 100", _bleu_statistics, bleu_figure, needs_references),
    Metric("chrf", "chrF2 of all answers, 0 to 100", _chrf_statistics, chrf_figure, needs_references),
)  # fmt: skip
