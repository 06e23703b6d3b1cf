"""The worked example: how many questions the quickstart's model answers right, in both precisions, with several seeds.

    python -m benchmarks.support_desk [--seeds=3] [--precisions=bfloat16,float32] [--contender=peft] [--json]

Each training has a process of its own and the quickstart's data and settings. Afterwards the model answers the 66
held-out questions and the 40 that the support desk has no answer to, of the shipped suite. An answer is right by the
metric `right_answer`: it is nearer to its own wanted answer than to that of any other question, with F1 >= 0.5.

--contender=peft trains the same data, rank, layers, learning rate and steps with transformers and peft too, and
compares question by question: each question's score is the mean of its seeds, and the paired test is that of
`gemma-tune eval`. Needs `pip install -e '.[demo,peers]'`.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.contenders.desk import all_questions, questions
from benchmarks.machine import describe
from benchmarks.processes import Contender
from benchmarks.verdicts import Verdict, exit_with
from gemma_tune.evaluation.metrics.choice import METRICS
from gemma_tune.evaluation.resampling import SIGNIFICANT_P, PairedComparison, compare_paired

_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds, from 0.", lower_bound=1)
_PRECISIONS = flags.DEFINE_list("precisions", ["bfloat16", "float32"], "Number formats of weights and arithmetic.")
_CONTENDER = flags.DEFINE_enum("contender", "", ["", "peft"], "Whom to compare with.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")

_METRIC = METRICS["right_answer"]
_HANDED_OVER = "Talk to a person"
_MEAN_RIGHT, _LEAST_RIGHT, _MEAN_HANDED_OVER, _MOST_WRONGLY = 64, 62, 36, 2


def measure(who: str, precision: str) -> list[dict[str, Any]]:
    """Returns what a contender said for each seed, with `scores` of its answers: 1 for a right one."""
    runs = []
    for seed in range(_SEEDS.value):
        contender = Contender(f"desk_{who}", seed, precision)
        try:
            found = contender.run()
        finally:
            contender.stop()
        found["scores"] = _METRIC.statistics(all_questions(), found["answers"])[:, 0]
        found["counts"] = counts(found["scores"], found["answers"])
        runs.append(found)
        print(f"{who} {precision} seed {seed}: {found['counts']}, {found['seconds']:.0f} s", file=sys.stderr)
    return runs


def counts(scores: np.ndarray, answers: Sequence[str]) -> dict[str, int]:
    """Returns how many held-out questions are right, and how many of each part were handed over."""
    num_heldout = len(questions()["heldout"])
    return {
        "right": int(scores[:num_heldout].sum()),
        "handed over": int(scores[num_heldout:].sum()),
        "wrongly handed over": sum(_HANDED_OVER in answer for answer in answers[:num_heldout]),
    }


def verdicts(precision: str, runs: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Returns what the runs of a precision must reach."""
    right, handed_over, wrongly = (
        [run["counts"][name] for run in runs] for name in ("right", "handed over", "wrongly handed over")
    )
    return [
        (f"{precision}: held-out questions right, mean", x := np.mean(right), f"≥ {_MEAN_RIGHT}", x >= _MEAN_RIGHT),
        (f"{precision}: the same, worst seed", x := min(right), f"≥ {_LEAST_RIGHT}", x >= _LEAST_RIGHT),
        (
            f"{precision}: unanswerable ones handed over, mean",
            x := np.mean(handed_over),
            f"≥ {_MEAN_HANDED_OVER}",
            x >= _MEAN_HANDED_OVER,
        ),
        (
            f"{precision}: answerable ones handed over, mean",
            x := np.mean(wrongly),
            f"≤ {_MOST_WRONGLY}",
            x <= _MOST_WRONGLY,
        ),
    ]


def compare(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> PairedComparison:
    """Compares two contenders by the mean score of their seeds on each question; a positive difference is for ours."""
    statistics = [
        np.stack([mean := np.mean([run["scores"] for run in runs], axis=0), np.ones_like(mean)], axis=1)
        for runs in (theirs, ours)
    ]
    return compare_paired(_METRIC, *statistics)


def main(arguments: list[str]) -> None:
    """Trains and asks all contenders, one after the other."""
    del arguments
    console = Console(stderr=_JSON.value)
    console.print(describe())
    table = Table(
        "", "seed", "right", "handed over", "wrongly handed over", "seconds of training", title="The worked example"
    )
    found: list[Verdict] = []
    for precision in _PRECISIONS.value:
        runs = {who: measure(who, precision) for who in ("ours", *([_CONTENDER.value] if _CONTENDER.value else []))}
        for who, each in runs.items():
            for seed, run in enumerate(each):
                figures = [str(count) for count in run["counts"].values()]
                table.add_row(f"{who}, {precision}", str(seed), *figures, f"{run['seconds']:.0f}")
        found += verdicts(precision, runs["ours"])
        if _CONTENDER.value:
            paired = compare(runs["ours"], runs[_CONTENDER.value])
            is_worse = paired.difference < 0 and paired.p_value < SIGNIFICANT_P
            console.print(f"ours against {_CONTENDER.value}, {precision}: {paired}", markup=False)
            found.append(
                (f"{precision}: difference from {_CONTENDER.value}", paired.difference, "not worse", not is_worse)
            )
    console.print(table)
    exit_with(found, _JSON.value)


if __name__ == "__main__":
    app.run(main)
