"""Takes trials from a study so that none is lost or counted twice, whichever worker is killed and whenever.

A trial of the search is a slot: 0, 1, 2, …. What Optuna calls a trial is one attempt at a slot. If a worker dies, its
attempt fails and a new attempt of the same slot, with the same parameters, is put in the queue. All of this happens
while `study_lock` is held, and each step may be repeated: a worker that dies in between is cleaned up after like any
other.
"""

import collections
import contextlib
import datetime
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gemma_tune.config import Config
from gemma_tune.runtime.lock import file_lock
from gemma_tune.tuning.spaces.space import Space, base_values
from gemma_tune.tuning.storage import optuna_module

SLOT, WORKER = "slot", "worker"
_RETRY_OF = "retry_of"
_WORKERS = "workers"
_MOST_ATTEMPTS = 10  # A trial that is lost so often takes its workers with it.
_SECONDS_TO_SIGN = 60.0  # A worker puts its name on a trial in less time than this.


@contextlib.contextmanager
def signed_on(workdir: Path) -> Iterator[str]:
    """Yields the name of a new worker, whose lock file in the workdir is held while it lives."""
    folder = workdir / _WORKERS
    folder.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex[:12]
    file = folder / f"{name}.lock"
    with file_lock(file):
        yield name
    file.unlink(missing_ok=True)


def take_trial(study: Any, space: Space, base: Config, worker: str, make_sampler: Callable[[int], Any]) -> Any:
    """Takes a waiting trial, or makes one for the next slot, and suggests its parameters. Hold `study_lock`.

    Args:
        study: Optuna study.
        space: Searched settings.
        base: Config whose values the first trial has.
        worker: Name of the worker that will run it.
        make_sampler: Function from a slot to its sampler, so that a slot's parameters don't depend on who asks when.

    Returns:
        A running Optuna trial with all parameters, and the attributes `slot` and `worker`.
    """
    if not waiting_trials(study):
        slot = next_slot(study)
        study.sampler = make_sampler(slot)
        if slot == 0:
            study.enqueue_trial(space.first_values(base), user_attrs={SLOT: 0})
    else:
        slot = -1
    trial = study.ask()
    trial.set_user_attr(WORKER, worker)
    suggest(trial, space, base)
    if SLOT not in trial.user_attrs:
        trial.set_user_attr(SLOT, slot)  # Last: a trial without a slot has no parameters worth keeping.
    return trial


def suggest(trial: Any, space: Space, base: Config) -> dict[str, Any]:
    """Suggests a value for each setting whose condition holds."""
    values = base_values(base)
    chosen: dict[str, Any] = {}
    for setting in space.settings:
        if not setting.applies(values | chosen):
            continue
        if setting.choices:
            chosen[setting.path] = trial.suggest_categorical(setting.path, list(setting.choices))
        elif isinstance(setting.low, int):
            step = int(setting.step or 1)
            chosen[setting.path] = trial.suggest_int(
                setting.path, setting.low, setting.high, step=step, log=setting.log
            )
        else:
            chosen[setting.path] = trial.suggest_float(
                setting.path, setting.low, setting.high, step=setting.step, log=setting.log
            )
    return chosen


def requeue_lost_trials(study: Any, workdir: Path) -> int:
    """Puts the trials of dead workers back in the queue, each exactly once, and returns how many. Hold `study_lock`.

    A worker is dead if its lock file in `workdir` is there and nobody holds it. A worker without a lock file here
    belongs to a machine with another workdir: its trials are left to the same command there. A trial that was lost ten
    times is not tried again.
    """
    states = optuna_module().trial.TrialState
    trials = study.get_trials(deepcopy=False)
    retried = {trial.user_attrs.get(_RETRY_OF) for trial in trials}
    num_attempts = collections.Counter(trial.user_attrs.get(SLOT) for trial in trials)
    count = 0
    for trial in trials:
        if trial.state != states.RUNNING or not _is_lost(trial, workdir):
            continue
        slot = trial.user_attrs.get(SLOT)
        if slot is not None and trial.number not in retried and num_attempts[slot] < _MOST_ATTEMPTS:
            # A new attempt first, then the old one fails: after a kill in between, `retried` holds the number.
            params = {**trial.params, **trial.system_attrs.get("fixed_params", {})}
            study.enqueue_trial(params, user_attrs={SLOT: slot, _RETRY_OF: trial.number})
        study.tell(trial.number, state=states.FAIL)
        count += 1
    return count


def previous_values(study: Any, trial: Any) -> dict[int, float]:
    """Returns the first metric by step that a lost attempt of this trial has reported; none if there was no attempt."""
    number = trial.user_attrs.get(_RETRY_OF)
    if number is None:
        return {}
    lost = study.get_trials(deepcopy=False)[number]
    return {**previous_values(study, lost), **lost.intermediate_values}


def _is_lost(trial: Any, workdir: Path) -> bool:
    worker = trial.user_attrs.get(WORKER, "")
    if not worker:
        age = datetime.datetime.now(datetime.UTC) - _aware(trial.datetime_start)
        return (workdir / "study.jsonl").exists() or age.total_seconds() > _SECONDS_TO_SIGN
    file = workdir / _WORKERS / f"{worker}.lock"
    if not file.exists():
        return False
    try:
        with file_lock(file):
            return True
    except BlockingIOError:
        return False


def _aware(time: datetime.datetime) -> datetime.datetime:
    """Returns a time with its zone: journals keep it, databases don't."""
    return time if time.tzinfo else time.astimezone()


def waiting_trials(study: Any) -> list[Any]:
    """Returns the trials that are in the queue."""
    return study.get_trials(deepcopy=False, states=(optuna_module().trial.TrialState.WAITING,))


def next_slot(study: Any) -> int:
    """Returns the number of the first slot that has no trial."""
    return 1 + max((trial.user_attrs.get(SLOT, -1) for trial in study.get_trials(deepcopy=False)), default=-1)


def attempts_by_slot(study: Any) -> dict[int, Any]:
    """Returns the newest attempt at each slot."""
    newest = {}
    for trial in study.get_trials(deepcopy=False):
        if SLOT in trial.user_attrs:
            newest[trial.user_attrs[SLOT]] = trial
    return dict(sorted(newest.items()))
