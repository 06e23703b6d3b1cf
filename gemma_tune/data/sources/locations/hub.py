"""Finds the files of a data set on the Hugging Face Hub, and downloads them to the Hub's cache or finds them there."""

import functools
import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gemma_tune.data.example import OnNote
from gemma_tune.data.sources.file_formats.data_file import SUFFIXES, DataFile, format_of
from gemma_tune.data.sources.locations.repository_layout import README, RepositoryFiles, choose_files
from gemma_tune.errors import DataError

HUB = "hf://"
_ADDRESS = re.compile(
    r"hf://datasets/(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.+ -]+))?(?:@(?P<split>[\w.-]+))?"
)
_SHORT = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?::[\w.+ -]+)?(?:@[\w.-]+)?")
# Where the Hub keeps what it has converted to Parquet itself (huggingface.co/docs/dataset-viewer/parquet).
_CONVERTED = "refs/convert/parquet"
_TIMEOUT_SECONDS = 10.0


class _NotFound(DataError):
    """A data set doesn't exist, or can't be had."""


class HubDataset(NamedTuple):
    """A data set on the Hub.

    Attributes:
        repository: `ORG/NAME`.
        config: Name of one of its configurations (subsets); empty: the only one, or its default.
        split: Name of the split; empty: not named.
    """

    repository: str
    config: str
    split: str

    @property
    def address(self) -> str:
        """Address of the repository."""
        return f"hf://datasets/{self.repository}"


def parse_hub(source: str) -> HubDataset:
    """Returns the data set that `hf://datasets/ORG/NAME[:config][@split]` or `ORG/NAME[:config][@split]` names.

    Raises:
        DataError: It isn't written so.
    """
    full = source if source.startswith(HUB) else f"hf://datasets/{source}"
    found = _ADDRESS.fullmatch(full)
    if not found:
        raise DataError(
            f"{source} is not the address of a data set on the Hugging Face Hub. Write hf://datasets/ORG/NAME, with "
            ":CONFIG and @SPLIT behind it where the data set has several."
        )
    return HubDataset(found["repository"], found["config"] or "", found["split"] or "")


def may_be_on_hub(name: str) -> bool:
    """Returns whether a name that is no local file may mean `ORG/NAME` on the Hub."""
    return bool(_SHORT.fullmatch(name)) and format_of(name) not in SUFFIXES


def hub_files(source: str, split: str, on_note: OnNote) -> list[DataFile]:
    """Returns the files of a data set on the Hub, which are downloaded if they aren't in the Hub's cache yet.

    Without network, or with HF_HUB_OFFLINE=1, what the cache has is used.

    Args:
        source: Source as in `parse_hub`.
        split: Split to read if the source names none.
        on_note: Function that is told when files come from the cache, or when they aren't the whole data set.

    Raises:
        DataError: The source isn't written as an address; the data set doesn't exist, has no such split or
            configuration or no files that can be read, or can be neither downloaded nor found in the cache; or two
            different splits are named.
    """
    dataset = parse_hub(source)
    if dataset.split and split not in ("train", dataset.split):
        raise DataError(
            f"{source} names the split {dataset.split!r}, but data.split or data.eval_split is {split!r}. Name it in "
            "one place."
        )
    try:
        files, notes = _found_files(dataset, dataset.split or split)
    except _NotFound as error:
        if source.startswith(HUB):
            raise
        raise DataError(f"There is no file {source}, so it was looked for on the Hugging Face Hub: {error}") from error
    for note in notes:
        on_note(note)
    return files


@functools.cache
def _found_files(dataset: HubDataset, split: str) -> tuple[list[DataFile], list[str]]:
    """Returns files and notes; in one process, the Hub is asked once."""
    try:
        return _download(dataset, split)
    except DataError:
        raise
    except Exception as error:  # No network, a full disk, a server error: many exception types.
        return _cached(dataset, split, error)


def _download(dataset: HubDataset, split: str) -> tuple[list[DataFile], list[str]]:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    for revision in ("main", _CONVERTED):
        try:
            info = huggingface_hub.HfApi().dataset_info(dataset.repository, revision=revision, timeout=_TIMEOUT_SECONDS)
        except GatedRepoError as error:
            raise DataError(
                f"{dataset.address} asks for consent: accept its terms at huggingface.co/datasets/{dataset.repository},"
                " then log in with `hf auth login` or set HF_TOKEN."
            ) from error
        except RepositoryNotFoundError as error:
            raise _NotFound(
                f"{dataset.address} doesn't exist, or needs a login: check the name, then run `hf auth login` or set "
                "HF_TOKEN."
            ) from error
        except RevisionNotFoundError:
            continue
        names = [sibling.rfilename for sibling in info.siblings or []]
        readme = None
        if README in names:
            readme = Path(
                huggingface_hub.hf_hub_download(dataset.repository, README, repo_type="dataset", revision=revision)
            )
        found = choose_files(names, readme, dataset.config, split, dataset.address)
        if found.paths:
            return _in_folder(_fetch(dataset, revision, found.paths), found, dataset, split), found.notes
    raise DataError(
        f"{dataset.address} has no files that can be read ({', '.join(SUFFIXES)}). Load it with the datasets package, "
        "and save it: datasets.load_dataset(…).to_parquet('data.parquet')."
    )


def _fetch(dataset: HubDataset, revision: str, paths: list[str]) -> Path:
    """Downloads files that the cache doesn't have yet, and returns the folder that they are in."""
    import huggingface_hub

    patterns = [glob.escape(path) for path in paths]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                dataset.repository, repo_type="dataset", revision=revision, allow_patterns=patterns
            )
        )
    except Exception as error:  # What the cache has may be a part only, so it is no way out here.
        raise DataError(
            f"{dataset.address}: the download was interrupted ({_first_line(error)}). The same command goes on with it."
        ) from error


def _cached(dataset: HubDataset, split: str, reason: Exception) -> tuple[list[DataFile], list[str]]:
    """Returns the files that the Hub's cache has, for a reason for which it can't be asked."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    for revision in ("main", _CONVERTED):
        in_cache = functools.partial(
            huggingface_hub.snapshot_download,
            dataset.repository,
            repo_type="dataset",
            revision=revision,
            local_files_only=True,
        )
        try:
            folder = Path(in_cache(allow_patterns=[README]))
        except LocalEntryNotFoundError:
            continue
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        readme = folder / README if README in names else None
        try:
            found = choose_files(names, readme, dataset.config, split, dataset.address)
        except DataError as error:
            raise DataError(f"{error} The Hub can't be reached, so only its cache was looked at.") from reason
        if found.paths:
            if revision == _CONVERTED:  # Its files are named by numbers alone, which don't say how many there are.
                _check_cached(dataset, in_cache, {f"{Path(path).parent}/*.parquet" for path in found.paths})
            note = f"{dataset.address}: the Hub can't be reached; its cache is read, commit {folder.name[:7]}."
            return _in_folder(folder, found, dataset, split), [note, *found.notes]
    raise _NotFound(
        f"{dataset.address} can't be downloaded ({_first_line(reason)}), and isn't in the Hub's cache. "
        f"On a machine with network, run `hf download "
        f"{dataset.repository} --repo-type=dataset --local-dir=FOLDER`, bring the folder here, and write --data=FOLDER."
    ) from reason


def _check_cached(dataset: HubDataset, in_cache: Callable[..., str], patterns: set[str]) -> None:
    """Raises DataError if the Hub had more files of these patterns than the cache has, as far as that is known."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        in_cache(allow_patterns=sorted(patterns))
    except LocalEntryNotFoundError as error:
        raise DataError(f"{dataset.address} is in the Hub's cache in part only. Read it once with network.") from error


def _in_folder(folder: Path, found: RepositoryFiles, dataset: HubDataset, split: str) -> list[DataFile]:
    return [DataFile(folder / path, f"{dataset.address}/{path}", split) for path in found.paths]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
