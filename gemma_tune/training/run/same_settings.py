"""Checks that a run is resumed with the settings and the files with which it was begun."""

from pathlib import Path
from typing import Any

from gemma_tune.config import Config
from gemma_tune.errors import TrainingError
from gemma_tune.runtime.shell import quoted_command
from gemma_tune.settings import flatten
from gemma_tune.workdir_config import PATH_SETTINGS, files_exist, path_setting, same_files, with_found_paths

RESULT_FILE = "result.json"  # A finished run has it.
# Settings that don't change what a run has computed so far.
_MAY_CHANGE = {
    "workdir",
    "training.keep_last",
    "training.log_every_steps",
    "training.on_bad_step",
    "training.loss_spike_factor",
    "training.mesh",
    "training.num_sample_answers",
    "training.num_scored_answers",
    "training.eval_metrics",
    "training.report_to",
    "training.report_artifacts",
}
_DATA = ("data.source", "data.eval_source")


def check_same_settings(config: Config, about: dict[str, Any], workdir: Path, data_key: str = "") -> None:
    """Checks that a run may be resumed with a Config.

    Files may be named by other paths, as from another folder. Data may also have been moved: then they must have the
    same content.

    Args:
        config: Settings to resume with.
        about: Settings and versions of the run's newest checkpoint.
        workdir: Workdir of the run.
        data_key: Key of the content of the data; empty: they haven't been read yet.

    Raises:
        TrainingError: Settings that matter differ; names them.
    """
    before = with_found_paths(about.get("config", {}), workdir)
    # Settings that an older version didn't have had the values that are now the defaults.
    was, now = flatten(before.to_dict()), flatten(config.to_dict())
    changed = [
        key
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and key not in _MAY_CHANGE and not key.startswith("generation.")
    ]
    changed = [
        key
        for key in changed
        if key not in PATH_SETTINGS or not same_files(path_setting(before, key), path_setting(config, key))
    ]
    if data_key in ("", about.get("versions", {}).get("data")):  # The same content, if they have been read.
        changed = [key for key in changed if key not in _DATA or not now[key] or files_exist(was[key])]
    if changed:
        text = "; ".join(f"{key} was {was.get(key)!r}, is {now.get(key)!r}" for key in changed)
        if data_key and set(changed) <= set(_DATA):
            text += ", which holds other rows"
        raise TrainingError(
            f"{workdir} holds a run with other settings: {text}. Use the same settings to resume it, or choose another "
            f"--workdir.{further_training(before, workdir)}"
        )


def further_training(config: Config, workdir: Path) -> str:
    """Returns how to train a run further, as a sentence; '' if it isn't finished.

    Args:
        config: Settings of the run.
        workdir: Workdir of the run.
    """
    if not (workdir / RESULT_FILE).exists():
        return ""
    if config.training.method == "full":
        from_it = f"{_flag('model', workdir)} and another --workdir"
    else:
        from_it = (
            f"{_flag('adapter', workdir / 'adapter')} and another --workdir. Leave out flags that begin with --lora, "
            "since the adapter has its own"
        )
    return f" To train this finished run further, start another one from what it has learnt: add {from_it}."


def _flag(name: str, path: Path) -> str:
    return quoted_command([f"--{name}={path}"])
