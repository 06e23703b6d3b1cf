"""The metrics of answers against sacrebleu, rouge-score and scikit-learn, on random pairs of texts.

    python -m benchmarks.eval_metrics [--pairs=1000] [--seed=0] [--json]

Texts hold punctuation, numbers and several alphabets, and some answers are empty. ROUGE is compared on their ASCII
part, which is all that rouge-score's own tokenizer keeps. Needs `pip install -e '.[eval,peers]'`.
"""

import random
from collections.abc import Callable

import numpy as np
from absl import app, flags

from benchmarks.verdicts import exit_with
from gemma_tune.data import Turn
from gemma_tune.evaluation.answers import words
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.choice import METRICS
from gemma_tune.evaluation.resampling import figure_of, row_figures

_PAIRS = flags.DEFINE_integer("pairs", 1000, "Pairs of answer and wanted answer.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "Of the texts.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")

_TEXT = 'the a phone battery of Settings > open it, reset. don\'t 12 3.5 über größe नमस्ते 电池 ok! "quote" -dash-'


def random_pairs(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Returns answers and references; an answer begins like its reference."""
    rng, vocabulary = random.Random(seed), _TEXT.split()

    def text(lengths: tuple[int, ...]) -> str:
        return " ".join(rng.choice(vocabulary) for _ in range(rng.choice(lengths)))

    references = [text((1, 2, 3, 5, 8, 13, 21)) for _ in range(count)]
    answers = []
    for reference in references:
        kept = reference.split()[: rng.randint(0, len(reference.split()))]
        answers.append(" ".join([*kept, text((0, 1, 3))]).strip())
    return answers, references


def rows(name: str, answers: list[str], references: list[str]) -> np.ndarray:
    """Returns our score of each pair."""
    return row_figures(METRICS[name], METRICS[name].statistics(cases(references), answers))


def cases(references: list[str]) -> list[EvalCase]:
    """Returns a case for each reference."""
    return [EvalCase((Turn("user", "question"),), reference, {}) for reference in references]


def of_sacrebleu(name: str, answers: list[str], references: list[str]) -> float:
    """Returns the largest difference from sacrebleu, of the corpus and of single pairs."""
    import sacrebleu

    scorer = sacrebleu.BLEU(effective_order=True) if name == "bleu" else sacrebleu.CHRF()
    corpus = figure_of(METRICS[name], METRICS[name].statistics(cases(references), answers))
    difference = abs(corpus - scorer.corpus_score(answers, [references]).score)
    pairs = zip(answers, references, strict=True)
    single = np.array([scorer.sentence_score(answer, [reference]).score for answer, reference in pairs])
    return max(difference, float(np.abs(rows(name, answers, references) - single).max()))


def of_rouge_score(name: str, answers: list[str], references: list[str]) -> float:
    """Returns the largest difference from rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name])
    ascii_pairs = [
        tuple(text.encode("ascii", "ignore").decode() for text in pair)
        for pair in zip(answers, references, strict=True)
    ]
    kept = [pair for pair in ascii_pairs if pair[1].strip()]
    single = np.array([scorer.score(reference, answer)[name].fmeasure for answer, reference in kept])
    return float(np.abs(rows(name, [a for a, _ in kept], [r for _, r in kept]) - single).max())


def of_scikit_learn(name: str, answers: list[str], references: list[str]) -> float:
    """Returns the largest difference from scikit-learn, by indicators of the n-th occurrence of each word."""
    from sklearn.metrics import accuracy_score, f1_score

    single = []
    for answer, reference in zip(answers, references, strict=True):
        first, second = words(answer), words(reference)
        if name == "exact_match":
            single.append(accuracy_score([" ".join(second)], [" ".join(first)]))
            continue
        keys = sorted({(word, n) for text in (first, second) for word in text for n in range(text.count(word))})
        if not keys:
            single.append(1.0)  # Both are empty: SQuAD's definition.
            continue
        ours, wanted = ([text.count(word) > n for word, n in keys] for text in (first, second))
        single.append(f1_score(wanted, ours, zero_division=0.0))
    return float(np.abs(rows(name, answers, references) - np.array(single)).max())


_PEERS: dict[str, tuple[Callable[[str, list[str], list[str]], float], str, float]] = {
    "bleu": (of_sacrebleu, "sacrebleu", 1e-9),
    "chrf": (of_sacrebleu, "sacrebleu", 1e-9),
    "rouge1": (of_rouge_score, "rouge-score", 1e-6),
    "rouge2": (of_rouge_score, "rouge-score", 1e-6),
    "rougeL": (of_rouge_score, "rouge-score", 1e-6),
    "exact_match": (of_scikit_learn, "scikit-learn", 1e-9),
    "f1": (of_scikit_learn, "scikit-learn", 1e-9),
}


def main(argv: list[str]) -> None:
    """Prints the largest difference of each metric."""
    del argv
    answers, references = random_pairs(_PAIRS.value, _SEED.value)
    verdicts = []
    for name, (difference, peer, most) in _PEERS.items():
        measured = difference(name, answers, references)
        verdicts.append((f"{name}, difference from {peer}", measured, f"at most {most:g}", measured <= most))
    exit_with(verdicts, _JSON.value)


if __name__ == "__main__":
    app.run(main)
