"""Recognizes the names of splits, in the names of files and folders, and chooses the files of one split.

The words, and how they may stand in a name, are those of the Hugging Face Hub
(huggingface.co/docs/hub/datasets-file-names-and-splits), and `heldout`, which `gemma-tune data --output` writes.
"""

import re
from collections.abc import Sequence

from gemma_tune.errors import DataError, did_you_mean

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "heldout": ("heldout",),
}
_SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
_SHARD = re.compile(r"(?:.*/)?(?P<split>[\w.]+?)-(?P<index>\d{5})-of-(?P<count>\d{5})\b[^/]*")


def same_split(name: str) -> str:
    """Returns one name for all names of a split, such as `validation` for `dev`; '' if it names none."""
    return _SPLIT_OF_WORD.get(name.lower(), "")


def split_of_file(path: str) -> str:
    """Returns the split that a relative path names; '' if it names none.

    `data/train_sft-00000-of-00003.parquet` has the split `train_sft`. Otherwise, a word between signs or digits
    counts, in the file's name before the folders' names.
    """
    shard = _SHARD.fullmatch(path)
    if shard:
        return _SPLIT_OF_WORD.get(shard["split"], shard["split"])
    for part in reversed(path.split("/")):
        for word in re.findall(r"[a-z]+", part.lower()):
            if word in _SPLIT_OF_WORD:
                return _SPLIT_OF_WORD[word]
    return ""


def files_of_split(paths: Sequence[str], split: str, source: str) -> list[str]:
    """Returns the paths of a split. Where none of them names a split, all are of it.

    Args:
        paths: Relative paths.
        split: Name of the split.
        source: What has these files, for messages.

    Raises:
        DataError: No file is of this split, or one of several numbered parts of it is missing.
    """
    splits = {path: split_of_file(path) for path in paths}
    if not any(splits.values()):
        check_complete(paths, source)
        return list(paths)
    wanted = _SPLIT_OF_WORD.get(split, split)
    chosen = [path for path in paths if splits[path] == wanted]
    if not chosen:
        raise no_split(source, split, sorted(set(splits.values()) - {""}))
    check_complete(chosen, source)
    return chosen


def no_split(source: str, split: str, found: Sequence[str]) -> DataError:
    """Returns the error of a source that hasn't the split that is asked for, but others."""
    how = "write @SPLIT behind its name" if source.startswith("hf://") else "set data.split"
    return DataError(f"{source} has no split {split!r}. It has {', '.join(found)}: {how}.{did_you_mean(split, found)}")


def check_complete(paths: Sequence[str], source: str) -> None:
    """Raises DataError if the names of files say that there are more of them, such as `-00000-of-00003`."""
    indices: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        shard = _SHARD.fullmatch(path)
        if shard:
            count = int(shard["count"])
            stem = path[: shard.start("index")]
            indices.setdefault((stem, count), set()).add(int(shard["index"]))
    for (stem, count), found in indices.items():
        missing = sorted(set(range(count)) - found)
        if missing:
            raise DataError(
                f"{source}: {len(missing)} of {count} files are missing, the first is "
                f"{stem}{missing[0]:05}-of-{count:05}."
            )
