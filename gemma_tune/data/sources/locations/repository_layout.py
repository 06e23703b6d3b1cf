"""Chooses the files of one split in a repository of the Hugging Face Hub, or in a folder with a copy of it.

The card of a data set, README.md, may say which files make up which configuration and split
(huggingface.co/docs/hub/datasets-manual-configuration). Otherwise the names of files and folders say it.
"""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.data.sources.file_formats.data_file import format_of, is_data
from gemma_tune.data.sources.locations.split_names import check_complete, files_of_split, no_split
from gemma_tune.errors import DataError, did_you_mean

_PREFERRED = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".arrow")
_USUAL_CONFIGS = ("default", "main", "all")
README = "README.md"


class RepositoryFiles(NamedTuple):
    """The files of a split.

    Attributes:
        paths: Paths in the repository; empty where it has no files that can be read.
        notes: Sentences that the user should know.
    """

    paths: list[str]
    notes: list[str]


def choose_files(names: Sequence[str], readme: Path | None, config: str, split: str, address: str) -> RepositoryFiles:
    """Returns the files of a split.

    Args:
        names: Paths of all files of the repository.
        readme: Its card, if it has one.
        config: Name of a configuration; empty: the only one, or the default.
        split: Name of the split.
        address: Address of the repository, or the folder, for messages.

    Raises:
        DataError: There are several configurations and none is named, or no such configuration or split.
    """
    paths = [name for name in sorted(names) if is_data(name)]
    configs = card_configs(readme) if readme else {}
    if configs:
        splits = _chosen(config, configs, address).splits
        if split not in splits:
            raise no_split(address, split, list(splits))
        chosen = [path for path in paths if any(_matches(path, pattern) for pattern in splits[split])]
        check_complete(chosen, address)
        return RepositoryFiles(chosen, [])
    paths = _of_one_format(_in_config_folder(paths, config, address))
    chosen = files_of_split(paths, split, address)
    partial = [path for path in chosen if "/partial-" in path]
    notes = [f"{address}: the Hub has converted only its first part to Parquet, which is read."] if partial else []
    return RepositoryFiles(chosen, notes)


def _of_one_format(paths: list[str]) -> list[str]:
    formats = {format_of(path) for path in paths}
    first = next((suffix for suffix in _PREFERRED if suffix in formats), "")
    return [path for path in paths if format_of(path) == first]


class CardConfig(NamedTuple):
    """A configuration of a data set, as its card has it.

    Attributes:
        splits: Patterns of the files of each split.
        is_default: Whether it is read if none is named.
    """

    splits: dict[str, list[str]]
    is_default: bool


def card_configs(readme: Path) -> dict[str, CardConfig]:
    """Returns the configurations in a data set's card that say which files they have, by name."""
    if not readme.is_file():
        return {}
    from huggingface_hub.repocard import metadata_load

    try:
        configs = (metadata_load(readme) or {}).get("configs") or []
        return {
            str(each["config_name"]): CardConfig(_splits_of(each["data_files"]), each.get("default") is True)
            for each in configs
            if each.get("data_files")
        }
    except Exception:  # A card is written by hand: without a readable one, the names of files decide.
        return {}


def _splits_of(data_files: Any) -> dict[str, list[str]]:
    """Returns the patterns of each split. Those without a split are of `train`."""
    splits: dict[str, list[str]] = {}
    for entry in [data_files] if isinstance(data_files, str) else data_files:
        split, paths = ("train", entry) if isinstance(entry, str) else (str(entry["split"]), entry["path"])
        splits.setdefault(split, []).extend([paths] if isinstance(paths, str) else paths)
    return splits


def _chosen(config: str, configs: dict[str, CardConfig], address: str) -> CardConfig:
    if not config and len(configs) > 1:
        config = next((name for name, each in configs.items() if each.is_default), "")
        config = config or next((name for name in _USUAL_CONFIGS if name in configs), "")
    if not config and len(configs) == 1:
        return next(iter(configs.values()))
    if config not in configs:
        raise _no_config(config, list(configs), address)
    return configs[config]


def _no_config(config: str, configs: Sequence[str], address: str) -> DataError:
    wrong = f"has no configuration {config!r}, but" if config else "has several configurations:"
    shown = ", ".join(configs[:20]) + (" …" if len(configs) > 20 else "")
    return DataError(
        f"{address} {wrong} {shown}. Name one as in hf://datasets/ORG/NAME:{configs[0]}, or its files."
        f"{did_you_mean(config, configs)}"
    )


def _matches(path: str, pattern: str) -> bool:
    pattern = pattern.removeprefix("./")
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, pattern.replace("**/", ""))


def _in_config_folder(paths: list[str], config: str, address: str) -> list[str]:
    """Returns the paths in the folder that has a configuration's name; without a name, all of them."""
    folders = sorted({path.split("/")[0] for path in paths if path.count("/") >= 2})
    if config:
        inside = [path for path in paths if path.startswith(f"{config}/")]
        if not inside and config != "default":
            raise _no_config(config, folders or ["default"], address)
        return inside or paths
    if len(folders) > 1:
        usual = next((name for name in _USUAL_CONFIGS if name in folders), "")
        if not usual:
            raise _no_config("", folders, address)
        return [path for path in paths if path.startswith(f"{usual}/")]
    return paths
