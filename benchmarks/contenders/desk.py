"""What the contenders of `benchmarks.support_desk` have in common: the run, the questions, and how they report.

A contender takes SEED and PRECISION, trains, answers all questions, and prints {"answers": …, "seconds": …,
"num_steps": …}.
"""

from collections.abc import Sequence
from pathlib import Path

from gemma_tune.cli.quickstart import recipe
from gemma_tune.config import Config
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.choice import METRICS
from gemma_tune.evaluation.suites.load_suite import load_suite

SUITE = "smartphone_support"
PARTS = ("heldout", "unanswerable")  # Parts of the suite that are asked, in this order.
MAX_NEW_TOKENS = 96


def config(seed: int, precision: str, workdir: Path | str) -> Config:
    """Returns the quickstart's settings of a run.

    Args:
        seed: Random seed of LoRA's factors and of the order of the data.
        precision: `bfloat16` or `float32`.
        workdir: Folder of the run.
    """
    return recipe("demo", precision).replace({"seed": seed, "workdir": str(workdir)})


def questions() -> dict[str, Sequence[EvalCase]]:
    """Returns part of the suite -> its questions."""
    cases = {part.name: part.cases for part in load_suite(SUITE, METRICS).parts}
    return {name: cases[name] for name in PARTS}


def all_questions() -> list[EvalCase]:
    """Returns the questions of all parts, in their order."""
    return [case for cases in questions().values() for case in cases]
