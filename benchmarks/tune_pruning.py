"""What pruning saves, and what it costs: the same searches with ASHA and without, on the tiny model.

    python -m benchmarks.tune_pruning [--trials=24] [--seeds=3] [--pruner=asha] [--json]

Each seed is a search, and a split of the data, in the default space of LoRA, from the same first trial, on the support
desk's questions. Steps are counted as trained; the best trial's held-out loss is compared with that of the search
without pruning.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.verdicts import Verdict, exit_with

_TRIALS = flags.DEFINE_integer("trials", 24, "Number of trials of a search.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of searches of each kind.", lower_bound=1)
_PRUNER = flags.DEFINE_enum("pruner", "asha", ["asha", "hyperband"], "What prunes.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")
_LEAST_SAVED, _MOST_WORSE = 0.4, 0.02


def main(arguments: list[str]) -> None:
    """Runs the searches in one process."""
    del arguments
    from gemma_tune import Config
    from gemma_tune.tuning import start
    from gemma_tune.tuning.study import best_trials, run_search
    from gemma_tune.tuning.trial_run import STEPS
    from gemma_tune.tuning.trials import attempts_by_slot

    base = Config().replace({"model.source": "tiny", "data.max_length": 64, "training.num_epochs": 2})
    found: dict[tuple[str, int], tuple[int, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(_SEEDS.value):
            runner = None
            for pruner in (_PRUNER.value, "none"):
                config = base.replace({"workdir": str(Path(name) / f"{pruner}_{seed}"), "seed": seed})
                search = start.make_search(
                    config, budget=f"{_TRIALS.value}_trials", metric="heldout_loss", pruner=pruner
                )
                search, runner = start.prepare(search, runner=runner)
                study = run_search(search, runner)
                steps = sum(trial.user_attrs.get(STEPS, 0) for trial in attempts_by_slot(study).values())
                found[pruner, seed] = steps, best_trials(study)[0].value
                print(f"seed {seed}, {pruner}: {steps} steps, best {found[pruner, seed][1]:.4f}", file=sys.stderr)
    table = Table("seed", "steps", "steps unpruned", "saved", "best", "best unpruned", "worse by")
    saved, worse = [], []
    for seed in range(_SEEDS.value):
        (steps, best), (all_steps, unpruned) = found[_PRUNER.value, seed], found["none", seed]
        saved.append(1 - steps / all_steps)
        worse.append(best / unpruned - 1)
        table.add_row(
            str(seed), str(steps), str(all_steps), f"{saved[-1]:.0%}", f"{best:.4f}", f"{unpruned:.4f}",
            f"{worse[-1]:.1%}",
        )  # fmt: skip
    Console(stderr=_JSON.value).print(describe(), table)
    verdicts: list[Verdict] = [
        ("steps saved, median", value := statistics.median(saved), f"≥ {_LEAST_SAVED}", value >= _LEAST_SAVED),
        ("best worse by, median", value := statistics.median(worse), f"≤ {_MOST_WORSE}", value <= _MOST_WORSE),
    ]
    exit_with(verdicts, _JSON.value)


if __name__ == "__main__":
    app.run(main)
