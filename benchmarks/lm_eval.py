"""Multiple choice in lm-eval: our model against lm-eval's own `hf`, on the same weights and the same machine.

    python -m benchmarks.lm_eval [--model=demo] [--questions=200] [--repeats=3] [--precision=float32] [--json]

The questions are those of the shipped support desk; the choices are the right answer and those of three other topics.
hf reads the same weights from an export (`gemma-tune export --format=hf`), at each of some batch sizes, of which its
fastest counts. Both run the whole of `simple_evaluate`, in processes that take turns; the first round, in which ours
compiles, is shown apart. Ours must take less time, choose the same and be right as often.
Needs `pip install -e '.[demo,peers]'`; --model=tiny --questions=20 tries it out.
"""

import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.processes import Contender
from benchmarks.verdicts import Verdict, verdict_table

_MODEL = flags.DEFINE_string("model", "demo", "The model.")
_QUESTIONS = flags.DEFINE_integer("questions", 200, "Number of questions.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Rounds after the first; the median counts.", lower_bound=1)
_PRECISION = flags.DEFINE_enum("precision", "float32", ["float32", "bfloat16"], "Weights and arithmetic of both.")
_BATCH_SIZES = flags.DEFINE_list("hf_batch_sizes", ["1", "4", "16"], "Batch sizes of hf.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")

_TASK, _NUM_CHOICES = "support_desk_choice", 4
_TIE = {"float32": 1e-2, "bfloat16": 1.0}  # Nats between choices that rounding may swap; a choice has about 40 tokens.


def questions(count: int) -> list[dict[str, Any]]:
    """Returns rows with a question, four choices, and the number of the right one; always the same."""
    from gemma_tune.data.sources.readers import read_rows

    def fail(error: Exception) -> None:
        raise error

    sources = ("sample:smartphone_support", "sample:smartphone_support/heldout")
    rows = [row.fields for source in sources for row in read_rows(source, "train", fail)]
    if count > len(rows):
        raise SystemExit(f"--questions={count}: the support desk has {len(rows)}.")
    answers = {row["topic"]: row["response"] for row in rows}
    rng = random.Random(0)
    found = []
    for row in rng.sample(rows, count):
        others = rng.sample([text for topic, text in answers.items() if topic != row["topic"]], _NUM_CHOICES - 1)
        choices = [row["response"], *others]
        rng.shuffle(choices)
        found.append({"question": row["instruction"], "choices": choices, "answer": choices.index(row["response"])})
    return found


def write_task(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a task of lm-eval that reads a local file only."""
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": _TASK,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "questions.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / f"{_TASK}.yaml").write_text(json.dumps(task))


def measure(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns contender -> what it said in each round."""
    from gemma_tune.export import export_model

    export_model(_MODEL.value, "hf", folder / "hf", precision=_PRECISION.value)
    tasks = folder / "tasks"
    tasks.mkdir()
    write_task(tasks, questions(_QUESTIONS.value))
    common = (_PRECISION.value, tasks, _TASK)
    ours = Contender("lm_eval_model", "ours", _MODEL.value, *common)
    theirs = Contender("lm_eval_model", "hf", folder / "hf", *common)
    names = {"ours": (ours, "0"), **{f"hf, batch size {size}": (theirs, size) for size in _BATCH_SIZES.value}}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        ours.start(), theirs.start()
        for turn in range(_REPEATS.value + 1):
            for name, (contender, size) in names.items():
                found[name].append(contender.ask(size))
                print(f"{turn} of {_REPEATS.value}, {name}: {found[name][-1]['seconds']:.1f} s", file=sys.stderr)
    finally:
        ours.stop(), theirs.stop()
    return found


def figures_of(said: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns one contender's figures."""
    return {
        "seconds": statistics.median(each["seconds"] for each in said[1:]),
        "first_seconds": said[0]["seconds"],
        "accuracy": said[-1]["accuracy"],
        "peak_bytes": said[-1]["peak_bytes"],
    }


def differences(ours: list[list[float]], theirs: list[list[float]]) -> dict[str, Any]:
    """Returns how many questions get another choice, how many of them by more than rounding, and the gap in nats."""
    first, second = np.array(ours), np.array(theirs)
    differs = first.argmax(axis=1) != second.argmax(axis=1)
    best = np.sort(second, axis=1)
    is_tie = best[:, -1] - best[:, -2] < _TIE[_PRECISION.value]
    return {
        "other_choices": int(differs.sum()),
        "other_choices_beyond_rounding": int((differs & ~is_tie).sum()),
        "largest_difference_nats": float(np.abs(first - second).max()),
    }


def verdicts(figures: dict[str, dict[str, Any]], compared: dict[str, Any]) -> list[Verdict]:
    """Returns (what, figure, what it must be, whether it is)."""
    ours = figures["ours"]
    fastest = min((row for name, row in figures.items() if name != "ours"), key=lambda row: row["seconds"])
    ratio = fastest["seconds"] / ours["seconds"]
    others, gap = compared["other_choices_beyond_rounding"], abs(ours["accuracy"] - fastest["accuracy"])
    allowed = compared["other_choices"] / _QUESTIONS.value
    return [
        ("hf's time, of ours", ratio, "> 1", ratio > 1),
        ("questions with another choice, beyond rounding", others, "0", others == 0),
        ("difference of the accuracies", gap, f"≤ {allowed:.3g}, that of ties", gap <= allowed + 1e-9 and not others),
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the figures and the verdicts."""
    title = f"{_QUESTIONS.value} questions, {_MODEL.value}, {_PRECISION.value}"
    table = Table("", "seconds", "first round", "accuracy", "peak", title=title, title_justify="left")
    for name, row in result["figures"].items():
        cells = (f"{row['seconds']:.2f}", f"{row['first_seconds']:.2f}", f"{row['accuracy']:.3f}")
        table.add_row(name, *cells, f"{row['peak_bytes'] / 1e9:.2f} GB")
    console.print(table)
    for what, value in result["compared"].items():
        console.print(f"{what.replace('_', ' ')}: {value:.3g}")
    console.print(verdict_table(result["verdicts"]))


def main(argv: list[str]) -> None:
    """Measures, prints, and exits with 1 if a figure is missed."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        said = measure(Path(folder))
    figures = {name: figures_of(each) for name, each in said.items()}
    hf = next(name for name in said if name != "ours")
    compared = differences(said["ours"][-1]["log_probs"], said[hf][-1]["log_probs"])
    result = {
        "machine": describe(),
        "figures": figures,
        "seconds": {name: [each["seconds"] for each in rounds] for name, rounds in said.items()},
        "compared": compared,
        "verdicts": verdicts(figures, compared),
    }
    show(result, Console(stderr=_JSON.value))
    if _JSON.value:
        print(json.dumps(result))
    sys.exit(not all(reached for *_, reached in result["verdicts"]))


if __name__ == "__main__":
    app.run(main)
