"""Reads and cleans a data set, and splits it into training and held-out examples.

Rows are read as a stream, and the cleaned examples are stored on disk. No model is needed. A second run with the same
files and settings uses what the first one stored.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.data.chunks import garbage_collector_paused
from gemma_tune.data.cleaned_examples import CleanedExamplesWriter, ExampleHashes, NamedSplit, read_examples
from gemma_tune.data.cleaning import SAMPLES_KEPT, Cleaner, DroppedSample, text_shown
from gemma_tune.data.cleaning_report import DataReport
from gemma_tune.data.dedup import NearDuplicates
from gemma_tune.data.example import Example
from gemma_tune.data.heldout_split import heldout_by_question
from gemma_tune.data.mixture import MixturePart, parse_mixture
from gemma_tune.data.rows.row_options import RowOptions
from gemma_tune.data.sources.content_hash import source_fingerprint, without_folders
from gemma_tune.data.sources.readers import heldout_of
from gemma_tune.data.storage.array_files import read_array, write_array
from gemma_tune.data.storage.cache import cache_key, cached
from gemma_tune.data.storage.example_store import ExampleStore, ExampleWriter
from gemma_tune.errors import DataError

_TRAIN, _HELDOUT, _DROPPED = range(3)
_PARTS, _SOURCES = "parts", "sources"


@dataclasses.dataclass
class Splits:
    """Cleaned examples, on disk.

    Attributes:
        train: Examples for training.
        heldout: Held-out examples.
        train_sources: [n] uint16 number, in `report.sources`, of the source of each training example.
        heldout_sources: The same of each held-out example.
        report: Numbers of rows read and dropped.
        key: Key of the cache entry that holds them.
        content_key: Key of their content, which is the same wherever the files are.
    """

    train: ExampleStore
    heldout: ExampleStore
    train_sources: np.ndarray
    heldout_sources: np.ndarray
    report: DataReport
    key: str
    content_key: str


def load_examples(
    source: str, split: str = "train", on_error: str = "raise", options: RowOptions | None = None
) -> list[Example]:
    """Reads all examples of a source, without cleaning them.

    Args:
        source: Files, folders or names of data sets, as in `data.source`.
        split: Split to read of a data set that has several.
        on_error: Treatment of unreadable rows: `raise` or `skip`.
        options: Settings of how rows become turns; None: the defaults.

    Raises:
        DataError: The source doesn't exist, or a row is unreadable; says where, what was found and what to do.
    """
    return read_examples([part.source for part in parse_mixture(source)], split, on_error, options or RowOptions())


def load_splits(
    source: str,
    control_tokens: Sequence[str],
    *,
    eval_source: str,
    split: str,
    eval_split: str,
    eval_fraction: float,
    system_prompt: str,
    on_error: str,
    dedup: str,
    near_dedup_threshold: float,
    seed: int,
    cache: Path | None = None,
    options: RowOptions | None = None,
) -> Splits:
    """Reads, cleans and splits a data set, or finds the result of an earlier run.

    Args:
        source, eval_source, split, eval_split, eval_fraction, system_prompt, on_error, dedup, near_dedup_threshold:
            Settings as in `config.DataConfig`. The weights of a mixture change nothing here.
        control_tokens: Control tokens as in `Cleaner`.
        seed: Random seed of the split.
        cache: Folder of the cache; None: a temporary folder.
        options: Settings of how rows become turns; None: the defaults.

    Raises:
        DataError: A source doesn't exist, a row is unreadable, or no training example is left.
        ConfigError: Near duplicates are to be dropped, and the package for it is missing.
    """
    options = options or RowOptions()
    eval_source = heldout_source(source, eval_source, eval_split)
    groups = _groups(source, eval_source, split, eval_split)
    fingerprints = [(each.name, source_fingerprint(*each)) for group in groups for each in group]
    settings = {
        "groups": [len(group) for group in groups],
        "control_tokens": list(control_tokens),
        "eval_fraction": eval_fraction,
        "system_prompt": system_prompt,
        "on_error": on_error,
        "dedup": dedup,
        "near_dedup_threshold": near_dedup_threshold,
        "seed": seed,
        "options": dataclasses.asdict(options),
    }
    key = cache_key({"sources": [list(each) for each in fingerprints], **settings})
    content_key = cache_key({"sources": [without_folders(each) for _, each in fingerprints], **settings})

    def build(folder: Path) -> dict[str, Any]:
        report, hashes = DataReport(), []
        with ExampleWriter(folder) as writer, (folder / _SOURCES).open("wb") as numbers, garbage_collector_paused():
            cleaned_writer = CleanedExamplesWriter(writer, numbers, report, on_error, seed, options)
            for group in groups:
                near = NearDuplicates(near_dedup_threshold) if near_dedup_threshold else None
                cleaner = Cleaner(control_tokens, system_prompt, dedup, near)
                hashes.append(cleaned_writer.write_group(group, cleaner))
        parts = _parts([each.questions for each in hashes], eval_fraction)
        write_array(folder / _PARTS, parts)
        sources = read_array(folder / _SOURCES, np.uint16)
        _finish_report(report, parts, sources, hashes, ExampleStore.open(folder))
        if not (parts == _TRAIN).any():
            raise DataError(f"{source}: none of {report.num_rows} rows can be trained on. {report.drop_reasons()}")
        return report.counts()

    entry = cached(cache and cache / "examples", key, build)
    parts, sources = read_array(entry.folder / _PARTS, np.uint8), read_array(entry.folder / _SOURCES, np.uint16)
    examples = ExampleStore.open(entry.folder, entry.owner)
    places = [np.flatnonzero(parts == part) for part in (_TRAIN, _HELDOUT)]
    train, heldout = (examples.select(each) for each in places)
    return Splits(train, heldout, sources[places[0]], sources[places[1]], DataReport(**entry.values), key, content_key)


def heldout_source(source: str, eval_source: str, eval_split: str) -> str:
    """Returns the source of the held-out data; empty if a share of `source` is held out.

    Args:
        source, eval_source, eval_split: Settings as in `config.DataConfig`.
    """
    if eval_source or not eval_split:
        return eval_source or heldout_of(source)
    return ",".join(part.source for part in parse_mixture(source))


def _groups(source: str, eval_source: str, split: str, eval_split: str) -> list[list[NamedSplit]]:
    """Returns the sources of the training data, and those of the held-out data if it has sources of its own."""
    groups = [[NamedSplit(part.source, split) for part in parse_mixture(source)]]
    if eval_source:
        groups.append([NamedSplit(part.source, eval_split or split) for part in _without_weights(eval_source)])
    return groups


def _without_weights(eval_source: str) -> list[MixturePart]:
    parts = parse_mixture(eval_source)
    for part in parts:
        if part.weight is not None:
            raise DataError(f"{eval_source}: held-out data has no weights: all of it counts once. Name {part.source}.")
    return parts


def _finish_report(
    report: DataReport,
    parts: np.ndarray,
    sources: np.ndarray,
    hashes: Sequence[ExampleHashes],
    examples: ExampleStore,
) -> None:
    """Adds what is known when all examples are read: the split, and which example each duplicate repeats."""
    report.num_in_heldout = int((parts == _DROPPED).sum())
    places = np.flatnonzero(parts == _DROPPED)[:SAMPLES_KEPT].tolist()
    report.add_samples("num_in_heldout", [DroppedSample(examples[i].origin, text_shown(examples[i])) for i in places])
    for number, source in enumerate(report.sources):
        of_source = parts[sources == number]
        source["num_dropped"] += int((of_source == _DROPPED).sum())
    contents = np.concatenate([each.contents for each in hashes])
    for sample in report.samples.get("num_duplicates", []):
        first = np.flatnonzero(contents == np.uint64(sample["content_hash"]))[:1].tolist()
        sample["note"] = "".join(f"like {examples[place].origin}" for place in first)


def _parts(hashes: Sequence[np.ndarray], eval_fraction: float) -> np.ndarray:
    """Returns the [n] uint8 part that each example belongs to, from the question hashes of one or two sources."""
    train, *heldout = hashes
    if heldout:
        parts = np.where(np.isin(train, heldout[0]), _DROPPED, _TRAIN)
        return np.concatenate([parts, np.full(len(heldout[0]), _HELDOUT)]).astype(np.uint8)
    return np.where(heldout_by_question(train, eval_fraction), _HELDOUT, _TRAIN).astype(np.uint8)
