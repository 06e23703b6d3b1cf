"""Reads a run's settings from its workdir, wherever that is read from.

Paths in `config.json` stay as they were given: often relative to the folder in which training was started, which
`relative_to` beside them names. So a run can be used from another folder, and after it was moved together with its data
and its base model.
"""

import glob
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_tune.config import Config
from gemma_tune.errors import ModelError
from gemma_tune.runtime.json_files import read_json
from gemma_tune.saved_settings import RELATIVE_TO

CONFIG_JSON = "config.json"
# Settings that may name files, and whether they may name several with commas between.
PATH_SETTINGS = {"model.source": False, "model.adapter": False, "data.source": True, "data.eval_source": True}
_NO_PATHS = re.compile(r"(sample|tfds|tiny):|(demo|tiny)$|.*://")
_SUFFIX = re.compile(r".*\.[a-z][a-z0-9]{1,9}", re.IGNORECASE | re.DOTALL)  # Not that of gemma_1.1_instruct_2b_en.
_WITH_WEIGHT = re.compile(r"(.*?)(:\.?\d[^/:]*)?", re.DOTALL)  # A file of a mixture, and its weight.


def settings_to_save(config: Config, before: Mapping[str, Any] | None = None, workdir: Path = Path()) -> dict[str, Any]:
    """Returns the contents of a run's `config.json`: its settings, and the folder from which relative paths start.

    Args:
        config: Settings of the run.
        before: What was saved before, of a run that is resumed. Its paths stay if they name the same files, so that
            they don't depend on the folder in which the run was last resumed.
        workdir: Place of the run now.
    """
    saved = {**config.to_dict(), RELATIVE_TO: os.getcwd()}
    if before is None or RELATIVE_TO not in before:
        return saved
    found = with_found_paths(before, workdir)
    if all(same_files(path_setting(found, name), path_setting(config, name)) for name in PATH_SETTINGS):
        for name in PATH_SETTINGS:
            group, _, field = name.partition(".")
            saved[group][field] = before.get(group, {}).get(field, saved[group][field])
        saved |= {"workdir": before.get("workdir", saved["workdir"]), RELATIVE_TO: before[RELATIVE_TO]}
    return saved


def read_workdir_config(workdir: str | os.PathLike) -> Config:
    """Returns the Config of a run, with paths that hold in the current folder.

    A relative path is looked for, in this order: where it lay from the workdir, if both were moved together; in the
    folder in which the run was started (with a run of an older version, in the current folder); beside the workdir; in
    the workdir.

    Args:
        workdir: Workdir of a run.

    Raises:
        ModelError: Its config.json is missing or can't be read.
        ConfigError: It holds settings that this version doesn't know.
    """
    folder = Path(workdir).expanduser()
    return with_found_paths(read_json(folder / CONFIG_JSON), folder)


def with_found_paths(saved: Mapping[str, Any], workdir: Path) -> Config:
    """Returns the Config of saved settings as `read_workdir_config` does.

    Args:
        saved: Contents of a config.json.
        workdir: Place of the run now.
    """
    config = Config.from_saved(saved)
    near, beside = _places(saved, workdir)
    changes = {}
    for name, is_list in PATH_SETTINGS.items():
        value = path_setting(config, name)
        if (found := _find(value, near, beside, is_list)) != value:
            changes[name] = found
    return config.replace(changes) if changes else config


def with_full_paths(config: Config) -> Config:
    """Returns a Config whose relative paths are full ones, so that it means the same in every folder."""
    here = [Path.cwd()]
    changes = {"workdir": os.path.abspath(os.path.expanduser(config.workdir))}
    for name, is_list in PATH_SETTINGS.items():
        changes[name] = _find(path_setting(config, name), here, (), is_list, keeps_relative=False)
    return config.replace(changes)


def paths_from(config: Config, folder: Path) -> dict[str, str]:
    """Returns the settings that may name files, with relative paths as they are from a folder, wherever one stands."""
    found = {}
    for name, is_list in PATH_SETTINGS.items():
        parts = path_setting(config, name).split(",") if is_list else [path_setting(config, name)]
        seen = []
        for part in parts:
            path, weight = _split_weight(part)
            full = _find_one(path, [Path.cwd()], (), keeps_relative=False)
            seen.append((path if full is None else os.path.relpath(full, folder.absolute())) + weight)
        found[name] = ",".join(seen)
    return found


def path_setting(config: Config, name: str) -> str:
    """Returns the value of a setting of PATH_SETTINGS."""
    group, _, field = name.partition(".")
    return str(getattr(getattr(config, group), field))


def same_files(one: str, other: str) -> bool:
    """Returns whether two values of a setting that may name files mean the same in the current folder."""
    return one == other or _parts(one) == _parts(other)


def files_exist(value: str) -> bool:
    """Returns whether all files that a value names exist. What is the name of something else counts as existing."""
    paths = (
        [value] if os.path.exists(os.path.expanduser(value)) else [_split_weight(part)[0] for part in value.split(",")]
    )
    return all(
        not path or _NO_PATHS.match(path) or os.path.exists(path) or bool(glob.glob(path, recursive=True))
        for path in map(os.path.expanduser, paths)
    )


def missing_base(workdir: Path) -> ModelError:
    """Returns the error of a run whose base model isn't found: where it was, and how to say where it is now."""
    saved = read_json(workdir / CONFIG_JSON)
    was, started_in = str(saved["model"]["source"]), str(saved.get(RELATIVE_TO) or "")
    looked = ""
    if started_in and not os.path.isabs(os.path.expanduser(was)):
        was = os.path.normpath(os.path.join(started_in, was))
        near, beside = _places(saved, workdir)
        looked = f", nor in {', '.join(str(folder) for folder in dict.fromkeys([*near, *beside]))}"
    advice = (
        f"If it has moved, name it and the adapter: --model=FOLDER --adapter={shlex.quote(str(workdir / 'adapter'))}."
    )
    if (workdir / "model").is_dir():  # A fully trained model, which needs its base for comparisons alone.
        advice = "Name what to compare with: --against=FOLDER, or --against=none."
    return ModelError(f"The base model of {workdir} was {was}. It isn't there any more{looked}. {advice}")


def _places(saved: Mapping[str, Any], workdir: Path) -> tuple[list[Path], list[Path]]:
    """Returns the folders from which a run's relative paths started, and those beside its workdir, as full paths."""
    now, given = workdir.absolute(), os.path.expanduser(str(saved.get("workdir", "")))
    started_in = saved.get(RELATIVE_TO)
    moved_together = []
    if started_in or not os.path.isabs(given):
        start = str(started_in or "/")
        moved_together.append(now / os.path.relpath(start, os.path.join(start, given)))
    near = [*moved_together, Path(started_in) if started_in else Path.cwd()]
    return [_normal(folder) for folder in near], [_normal(now.parent), _normal(now)]


def _find(value: str, near: Sequence[Path], beside: Sequence[Path], is_list: bool, keeps_relative: bool = True) -> str:
    """Returns a value with its relative paths replaced by full ones; where they hold in the current folder, they may be
    kept.
    """
    whole = _find_one(value, near, beside, keeps_relative)
    if whole is not None or not is_list:
        return whole or _where_it_was(value, near)
    found = []
    for part in value.split(","):
        path, weight = _split_weight(part.strip())
        found.append((_find_one(path, near, beside, keeps_relative) or _where_it_was(path, near)) + weight)
    return ",".join(found)


def _find_one(path: str, near: Sequence[Path], beside: Sequence[Path], keeps_relative: bool) -> str | None:
    """Returns a path that holds in the current folder; None: it isn't found, or is the name of something else."""
    if not path or _NO_PATHS.match(path) or os.path.isabs(os.path.expanduser(path)):
        return None
    is_name = os.sep not in path and not _SUFFIX.fullmatch(path)  # It may be a preset.
    for folder in near if is_name else [*near, *beside]:
        full = os.path.normpath(folder / path)
        if os.path.exists(full):
            return path if keeps_relative and full == os.path.abspath(path) else full
        if glob.has_magic(path) and glob.glob(path, root_dir=folder, recursive=True):
            return path if keeps_relative and folder == Path.cwd() else os.path.join(glob.escape(str(folder)), path)
    return None


def _where_it_was(path: str, near: Sequence[Path]) -> str:
    """Returns the full path of a file that isn't found, so that the error says it; other values as they are."""
    is_file = _SUFFIX.fullmatch(path) and not _NO_PATHS.match(path)
    return str(near[-1] / path) if is_file and not os.path.isabs(os.path.expanduser(path)) else path


def _parts(value: str) -> list[str]:
    """Returns the full paths of all parts of a value, and other parts as they are."""
    if not value or ("," not in value and _NO_PATHS.match(value)):
        return [value]
    if os.path.exists(os.path.expanduser(value)):
        return [os.path.realpath(os.path.expanduser(value))]
    return [
        os.path.realpath(os.path.expanduser(path)) + weight if not _NO_PATHS.match(path) else path + weight
        for path, weight in map(_split_weight, value.split(","))
    ]


def _split_weight(part: str) -> tuple[str, str]:
    match = _WITH_WEIGHT.fullmatch(part.strip())
    return (match[1], match[2] or "") if match else (part, "")


def _normal(folder: Path) -> Path:
    return Path(os.path.normpath(folder))
