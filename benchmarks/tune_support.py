"""A search against the default settings, on the support desk's questions, with equally many training steps in all.

    python -m benchmarks.tune_support [--model=demo] [--trials=12] [--steps=60] [--json]

The search tunes for the loss of a fifth of the training questions, prunes, and starts from the default settings. What
it spends on all of its trials, one run with the default settings may spend on itself: it is trained for as many steps
as all trials together, and keeps its best step by the same loss. Both then answer the 66 held-out questions, which
neither has seen; differences are tested in pairs.
"""

import sys
import tempfile
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.verdicts import Verdict, exit_with

_MODEL = flags.DEFINE_string("model", "demo", "The model.")
_TRIALS = flags.DEFINE_integer("trials", 12, "Number of trials of the search.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 60, "Number of steps of a whole trial, of 512 tokens.", lower_bound=9)
_PRECISION = flags.DEFINE_string("precision", "float32", "Precision of the model.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")
_SAMPLE, _LEVEL = "sample:smartphone_support", 0.05


def main(arguments: list[str]) -> None:
    """Searches, trains with the default settings, and compares."""
    del arguments
    from gemma_tune import Config, pipeline
    from gemma_tune.data.sources.readers import resolve_files
    from gemma_tune.tuning import start
    from gemma_tune.tuning.results.result_files import write_results

    (train_file,), (test_file,) = resolve_files(_SAMPLE), resolve_files(f"{_SAMPLE}/heldout")
    with tempfile.TemporaryDirectory() as name:
        base = Config().replace({
            "workdir": f"{name}/search", "model.source": _MODEL.value, "model.precision": _PRECISION.value,
            "data.source": str(train_file), "data.eval_fraction": 0.2, "data.max_length": 128,
            "training.num_train_steps": _STEPS.value, "training.remat": "none", "training.num_sample_answers": 0,
            "training.num_scored_answers": 0, "generation.max_new_tokens": 80,
        })  # fmt: skip
        search = start.make_search(base, budget=f"{_TRIALS.value}_trials", metric="heldout_loss")
        findings = write_results(search, start.start_search(search))
        total = sum(row["num_steps"] for row in findings["trials"])
        best, first = findings["best"][0], findings["trials"][0]
        print(f"{total} steps in all; the best: {best}", file=sys.stderr)
        default = base.replace({
            "workdir": f"{name}/default", "training.num_train_steps": total,
            "training.eval_every_steps": max(1, total // 20),
        })  # fmt: skip
        run = pipeline.run_training(default)
        tested = base.replace({"data.source": str(test_file), "model.source": _MODEL.value})
        options = pipeline.EvaluationOptions(metrics=("f1", "exact_match"), against=str(run.workdir), num_questions=0)
        evaluation = pipeline.evaluate_answers(tested, best["adapter"], data_is_given=True, options=options)
    _print(evaluation, findings, first, run, total)
    compared = evaluation.comparisons["f1"]
    loss = [model.heldout["loss"] for model in evaluation.models]
    verdicts: list[Verdict] = [
        ("F1: search − default", compared.difference, "> 0", compared.difference > 0),
        ("p of the paired test", compared.p_value, f"< {_LEVEL}", compared.p_value < _LEVEL),
        ("held-out loss: search / default", ratio := loss[1] / loss[0], "< 1", ratio < 1),
    ]
    exit_with(verdicts, _JSON.value)


def _print(evaluation: Any, findings: dict[str, Any], first: dict[str, Any], run: Any, total: int) -> None:
    """Prints settings and figures of both."""
    best = findings["best"][0]
    table = Table("", f"default, {total} steps", "best of the search", title="The 66 held-out questions")
    table.add_row("loss", *(f"{model.heldout['loss']:.4f}" for model in evaluation.models))
    for metric in evaluation.metrics:
        table.add_row(metric.name, *(f"{figure.value:.3f}" for figure in evaluation.figures[metric.name]))
        compared = evaluation.comparisons[metric.name]
        table.add_row("  win/tie/loss", "", f"{compared.num_wins}/{compared.num_ties}/{compared.num_losses}")
    console = Console(stderr=_JSON.value)
    states = [row["state"] for row in findings["trials"]]
    console.print(describe(), table)
    console.print(
        f"Loss that was tuned: first trial {first['heldout_loss']:.4f}, best {best['values']['heldout_loss']:.4f}, "
        f"default after {run.best_step} of {total} steps {run.after['loss']:.4f}. Trials: {states.count('done')} done, "
        f"{states.count('pruned')} pruned. Best settings: {best['params']}",
        markup=False,
    )


if __name__ == "__main__":
    app.run(main)
