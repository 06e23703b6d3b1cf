"""Finds the data files in a folder: one written by Hugging Face datasets' `save_to_disk`, or any other."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_tune.data.example import OnNote
from gemma_tune.data.sources.file_formats.data_file import SUFFIXES, DataFile, format_of, is_data
from gemma_tune.data.sources.locations.repository_layout import README, card_configs, choose_files
from gemma_tune.data.sources.locations.split_names import check_complete, files_of_split, no_split
from gemma_tune.errors import DataError

_STATE, _DICT = "state.json", "dataset_dict.json"  # `save_to_disk` of a Dataset and of a DatasetDict.
_TFDS_FILES = ("features.json", "dataset_info.json")


def files_in_folder(folder: Path, split: str, on_note: OnNote) -> list[DataFile]:
    """Returns the data files in a folder and the folders in it.

    If their names say which split they are of, these are the files of one split.

    Args:
        folder: The folder.
        split: Name of the split.
        on_note: Function that is told which files are left out.

    Raises:
        DataError: The folder has no data files, files of several formats, or not this split.
    """
    if (folder / _DICT).is_file():
        return _saved_files(_saved_split(folder, split), split)
    if (folder / _STATE).is_file():
        return _saved_files(folder, split)
    if all((folder / name).is_file() for name in _TFDS_FILES):
        raise DataError(f"{folder} is a data set of TensorFlow Datasets. Write tfds:{folder}.")
    paths = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if is_data(path.name) and path.is_file() and not _is_hidden(path.relative_to(folder))
    )
    if not paths:
        raise DataError(f"{folder} is a directory without data files ({', '.join(SUFFIXES)}). Name a file.")
    if card_configs(folder / README):
        chosen = choose_files(paths, folder / README, "", split, str(folder)).paths
    else:
        chosen = files_of_split(paths, split, str(folder))
    formats = sorted({format_of(path) for path in chosen})
    if len(formats) > 1:
        example = os.path.join(folder, "*" + formats[0])
        raise DataError(
            f"{folder} has files of several formats: {', '.join(formats)}. Name those to read, for example {example}."
        )
    left_out = [path for path in paths if path not in set(chosen)]
    if left_out:
        on_note(f"{folder}: the split {split!r} is read from {_names(chosen)}; not read: {_names(left_out)}.")
    return [DataFile(folder / path, str(folder / path), split) for path in chosen]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _names(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _saved_split(folder: Path, split: str) -> Path:
    found = _read_object(folder / _DICT).get("splits")
    splits = [str(name) for name in found] if isinstance(found, list) else []
    if split not in splits:
        raise no_split(str(folder), split, splits)
    return folder / split


def _saved_files(folder: Path, split: str) -> list[DataFile]:
    """Returns the Arrow files of a saved Dataset, in the order of its rows."""
    state = _read_object(folder / _STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{folder} was saved by an old version of datasets, with its rows in another order than in its files. Load "
            "and save it anew: datasets.load_from_disk(FOLDER).save_to_disk(NEW)."
        )
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / _STATE} doesn't name the files of the data set in '_data_files'.") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: {len(missing)} of {len(names)} files are missing, the first is {missing[0]}.")
    check_complete(names, str(folder))
    return [DataFile(folder / name, str(folder / name), split) for name in names]


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {error}.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value
