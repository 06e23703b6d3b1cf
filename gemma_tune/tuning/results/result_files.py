"""Writes what a search has found: the best settings as a config file, all trials as CSV, and a report."""

import csv
import io
import json
import math
from collections.abc import Mapping
from typing import Any

from gemma_tune.config import Config
from gemma_tune.runtime.atomic_files import write_text
from gemma_tune.settings import flatten
from gemma_tune.tuning.results.search_report import search_report
from gemma_tune.tuning.results.setting_worth import comparable_values, importances
from gemma_tune.tuning.search import Search
from gemma_tune.tuning.study import best_trials
from gemma_tune.tuning.trial_run import BEST_STEP, ENDED_AS, METRICS, PROBLEM, STEPS
from gemma_tune.tuning.trials import SLOT, attempts_by_slot
from gemma_tune.workdir_config import with_full_paths

BEST, REPORT, TRIALS = "best.py", "report.html", "trials.csv"


def write_results(search: Search, study: Any) -> dict[str, Any]:
    """Writes `best.py`, `trials.csv` and `report.html` into the workdir, and returns the findings as plain values.

    Raises:
        TrainingError: No trial was finished.
    """
    rows = trial_rows(search, study)
    write_text(search.workdir / TRIALS, _csv(rows))
    best = best_trials(study)
    for index, trial in enumerate(best):
        name = BEST if not index else f"best_{index + 1}.py"
        write_text(
            search.workdir / name, config_file(with_full_paths(best_config(search, trial)), _origin(search, trial))
        )
    compared = comparable_values(search, study)
    shares = importances(search, compared)
    write_text(search.workdir / REPORT, search_report(search, study, compared, shares))
    goals = [goal.name for goal in search.settings.goals]
    return {
        "workdir": str(search.workdir),
        "metrics": goals,
        "best": [
            {
                "trial": trial.user_attrs[SLOT],
                "values": dict(zip(goals, trial.values, strict=True)),
                "params": trial.params,
                "adapter": _adapter(search, trial),
            }
            for trial in best
        ],
        "importances": shares,
        "trials": rows,
    }


def _adapter(search: Search, trial: Any) -> str:
    """Returns the folder of a trial's adapter; empty: it was not saved."""
    folder = search.trial_folder(trial.user_attrs[SLOT])
    return str(folder) if folder.is_dir() and any(folder.iterdir()) else ""


def best_config(search: Search, trial: Any) -> Config:
    """Returns the Config of a trial with a workdir of its own, to train with."""
    config = search.config_of(trial.params, trial.user_attrs[SLOT])
    return config.replace({"workdir": str(search.workdir / "best")})


def trial_rows(search: Search, study: Any) -> list[dict[str, Any]]:
    """Returns a row for each trial: its number, state, metrics, steps, seconds and searched settings."""
    rows = []
    for slot, trial in attempts_by_slot(study).items():
        metrics: Mapping[str, float] = trial.user_attrs.get(METRICS, {})
        rows.append(
            {
                "trial": slot,
                "state": state_of(trial),
                **{goal.name: value for goal, value in zip(search.settings.goals, trial.values or [], strict=False)},
                "num_steps": trial.user_attrs.get(STEPS, 0),
                "best_step": trial.user_attrs.get(BEST_STEP),
                "seconds": round(trial.duration.total_seconds(), 3) if trial.duration else None,
                **{setting.path: trial.params.get(setting.path) for setting in search.space.settings},
                **{f"metrics.{name}": value for name, value in sorted(metrics.items())},
                "problem": trial.user_attrs.get(PROBLEM, ""),
            }
        )
    return rows


def state_of(trial: Any) -> str:
    """Returns the state of a trial in a word or two."""
    return str(trial.user_attrs.get(ENDED_AS) or {"COMPLETE": "done"}.get(trial.state.name, trial.state.name.lower()))


def _csv(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def config_file(config: Config, origin: str) -> str:
    """Returns a config file, as in `configs/`, that makes a Config. It names only what differs from the defaults.

    Args:
        config: Settings of the run.
        origin: Sentence that says where they come from.
    """
    defaults = flatten(Config().to_dict())
    changed = {path: value for path, value in flatten(config.to_dict()).items() if value != defaults[path]}
    lines = "".join(f"            {_literal(path)}: {_literal(value)},\n" for path, value in changed.items())
    return (
        f'"""{origin}"""\n\nfrom gemma_tune import Config\n\n\n'
        f"def get_config() -> Config:\n    return Config().replace(\n        {{\n{lines}        }}\n    )\n"
    )


def _literal(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _origin(search: Search, trial: Any) -> str:
    figures = ", ".join(
        f"{goal.name} {value:.5g}" for goal, value in zip(search.settings.goals, trial.values, strict=True)
    )
    return f"Settings of trial {trial.user_attrs[SLOT]} of a search: {figures}."
