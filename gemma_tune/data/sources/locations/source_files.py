"""Finds the files that a source names: files, patterns, folders, samples, and data sets on the Hugging Face Hub."""

import glob
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from gemma_tune.data.example import OnNote
from gemma_tune.data.sources.file_formats.data_file import SUFFIXES, DataFile, format_of
from gemma_tune.data.sources.locations.dataset_folders import files_in_folder
from gemma_tune.data.sources.locations.hub import HUB, hub_files, may_be_on_hub
from gemma_tune.errors import DataError, did_you_mean

SAMPLES = Path(__file__).parents[2] / "samples"
SAMPLE = "sample:"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.*", re.DOTALL)
_HUB_PAGE = re.compile(r"https?://huggingface\.co/datasets/([\w.-]+/[\w.-]+)(/(tree|viewer)/.*)?/?")
_FETCHED_BY = {"http": "curl -LO", "https": "curl -LO", "ftp": "curl -LO", "s3": "aws s3 cp", "gs": "gcloud storage cp"}
_WHAT_TO_DO = {
    ".xlsx": "Save it as CSV.", ".xls": "Save it as CSV.", ".ods": "Save it as CSV.", ".zip": "Unpack it first: unzip.",
    ".tar": "Unpack it first: tar -xf.", ".tgz": "Unpack it first: tar -xf.", ".zst": "Unpack it first: zstd -d.",
    ".bz2": "Unpack it first: bunzip2.", ".xz": "Unpack it first: unxz.",
    ".txt": 'Write each text as {"text": "…"} on a line of a .jsonl file.',
}  # fmt: skip


def data_files(source: str, split: str, on_note: OnNote = lambda note: None) -> list[DataFile]:
    """Returns the files that a source names, in order and without repetition.

    A file or folder on this machine comes before a data set of the same name on the Hub.

    Args:
        source: Files, folders, globs, `hf://datasets/ORG/NAME[:config][@split]` or `ORG/NAME`, or several of them with
            commas between; `sample:NAME` or `sample:NAME/heldout`.
        split: Split to read where a source has several.
        on_note: Function that is told what else its user should know.

    Raises:
        DataError: A file doesn't exist or has an unknown suffix, a folder or data set has no data files, or it must be
            fetched first.
    """
    parts = [source] if os.path.exists(_expanded(source)) else source.split(",")
    files = [file for part in parts for file in _files_of_part(part.strip(), split, on_note)]
    return list({file.path: file for file in files}.values())


def sample_path(source: str) -> Path:
    """Returns the path of a sample, `sample:NAME` or `sample:NAME/PART`, whether it exists or not."""
    name, _, part = source.removeprefix(SAMPLE).partition("/")
    return SAMPLES / name / f"{part or 'train'}.jsonl"


def _expanded(path: str) -> str:
    """Returns a path with its `~` or `~USER` expanded, but not where a folder here has the name `~USER`."""
    first = path.split(os.sep)[0]
    return path if first != "~" and os.path.exists(first) else os.path.expanduser(path)


def _files_of_part(part: str, split: str, on_note: OnNote) -> Iterator[DataFile]:
    if part.startswith(SAMPLE):
        yield _sample(part, split)
        return
    path = _expanded(part)
    if os.path.exists(path):
        yield from _files_at(path, split, on_note)
    elif matches := _matches(path):
        for match in matches:
            yield from _files_at(match, split, on_note)
    elif part.startswith(HUB) or (may_be_on_hub(part) and not os.path.isdir(os.path.dirname(part))):
        yield from hub_files(part, split, on_note)
    elif _ADDRESS.fullmatch(part):
        raise _must_be_fetched(part)
    else:
        raise _not_found(path)


def _files_at(path: str, split: str, on_note: OnNote) -> Iterator[DataFile]:
    if os.path.isdir(path):
        yield from files_in_folder(Path(path), split, on_note)
        return
    suffix = format_of(path)
    if suffix not in SUFFIXES:
        what_to_do = f" {_WHAT_TO_DO[suffix]}" if suffix in _WHAT_TO_DO else ""
        raise DataError(
            f"{path} has an unknown suffix.{what_to_do} Known suffixes: {', '.join(SUFFIXES)}, each also with .gz."
        )
    yield DataFile(Path(path), path, split)


def _matches(path: str) -> list[str]:
    """Returns the files and folders that match a pattern. A folder that exists is meant as it is written."""
    folder, pattern = os.path.split(path)
    if os.path.isdir(folder):
        path = os.path.join(glob.escape(folder), pattern)
    return sorted(glob.glob(path, recursive=True))


def _not_found(path: str) -> DataError:
    if glob.has_magic(path):
        return DataError(f"No file matches {path}.")
    folder = os.path.dirname(path) or "."
    names = os.listdir(folder) if os.path.isdir(folder) else []
    on_hub = (
        f" If you mean a data set on the Hugging Face Hub, write {HUB}datasets/{path}." if may_be_on_hub(path) else ""
    )
    return DataError(f"There is no file {path}.{did_you_mean(os.path.basename(path), names)}{on_hub}")


def _must_be_fetched(address: str) -> DataError:
    page = _HUB_PAGE.fullmatch(address)
    if page:
        return DataError(f"{address} is a page of the Hugging Face Hub. Write {HUB}datasets/{page[1]}.")
    scheme = address.partition(":")[0].lower()
    if scheme not in _FETCHED_BY:
        return DataError(f"{address} can't be read. Fetch the file, and name it.")
    file = address.replace("/blob/", "/resolve/" if "//huggingface.co/" in address else "/raw/")
    name = os.path.basename(address.split("?")[0]) or "FILE"
    here = "" if _FETCHED_BY[scheme].startswith("curl") else " ."
    command = f"{_FETCHED_BY[scheme]} {shlex.quote(file)}{here}"
    return DataError(f"{address} isn't fetched for you. Run `{command}`, then write --data={shlex.quote(name)}.")


def _sample(source: str, split: str) -> DataFile:
    path = sample_path(source)
    if not path.exists():
        names = sorted(folder.name for folder in SAMPLES.iterdir() if folder.is_dir())
        name = source.removeprefix(SAMPLE).partition("/")[0]
        raise DataError(f"There is no sample {source!r}. Samples: {', '.join(names)}.{did_you_mean(name, names)}")
    return DataFile(path, str(path), split)
