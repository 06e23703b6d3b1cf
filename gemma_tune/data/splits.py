"""Reads and cleans a data set, and splits it into training and held-out examples.

Rows are read as a stream, and the cleaned examples are stored on disk. No model is needed. A second run with the same
files and settings uses what the first one stored.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.data.chunks import garbage_collector_paused, in_chunks
from gemma_tune.data.cleaning import Cleaner
from gemma_tune.data.cleaning_report import DataReport
from gemma_tune.data.example import Example
from gemma_tune.data.heldout_split import heldout_by_question, question_hash
from gemma_tune.data.rows.row_options import RowCounter, RowOptions
from gemma_tune.data.sources.content_hash import source_fingerprint
from gemma_tune.data.sources.readers import heldout_of, read_rows
from gemma_tune.data.sources.row_formats import to_examples
from gemma_tune.data.storage.array_files import read_array, write_array
from gemma_tune.data.storage.cache import cache_key, cached
from gemma_tune.data.storage.example_store import ExampleStore, ExampleWriter
from gemma_tune.errors import DataError
from gemma_tune.runtime import progress

_ERRORS_KEPT = 20
_TRAIN, _HELDOUT, _DROPPED = range(3)
_PARTS = "parts"


@dataclasses.dataclass
class Splits:
    """Cleaned examples, on disk.

    Attributes:
        train: Examples for training.
        heldout: Held-out examples.
        report: Numbers of rows read and dropped.
        key: Key of the cache entry that holds them.
    """

    train: ExampleStore
    heldout: ExampleStore
    report: DataReport
    key: str


def load_examples(
    source: str, split: str = "train", on_error: str = "raise", options: RowOptions | None = None
) -> list[Example]:
    """Reads all examples of a source, without cleaning them.

    Args:
        source: Files, globs, `tfds:name/config` or `sample:NAME`, as in `data.source`.
        split: Split of a TFDS data set.
        on_error: Treatment of unreadable rows: `raise` or `skip`.
        options: Settings of how rows become turns; None: the defaults.

    Raises:
        DataError: The source doesn't exist, or a row is unreadable; says where, what was found and what to do.
    """
    return list(_read_examples(source, split, on_error, DataReport(), options or RowOptions()))


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
    seed: int,
    cache: Path | None = None,
    options: RowOptions | None = None,
) -> Splits:
    """Reads, cleans and splits a data set, or finds the result of an earlier run.

    Args:
        source, eval_source, split, eval_split, eval_fraction, system_prompt, on_error: Settings as in
            `config.DataConfig`.
        control_tokens: Control tokens as in `Cleaner`.
        seed: Random seed of the split.
        cache: Folder of the cache; None: a temporary folder.
        options: Settings of how rows become turns; None: the defaults.

    Raises:
        DataError: A source doesn't exist, a row is unreadable, or no training example is left.
    """
    options = options or RowOptions()
    eval_source = heldout_source(source, eval_source, eval_split)
    sources = [(source, split), (eval_source, eval_split or split)][: 2 if eval_source else 1]
    key = cache_key(
        {
            "sources": [source_fingerprint(*each) for each in sources],
            "control_tokens": list(control_tokens),
            "eval_fraction": eval_fraction,
            "system_prompt": system_prompt,
            "on_error": on_error,
            "seed": seed,
            "options": dataclasses.asdict(options),
        }
    )

    def build(folder: Path) -> dict[str, Any]:
        report, hashes = DataReport(), []
        with ExampleWriter(folder) as writer, garbage_collector_paused():
            for each in sources:
                cleaner = Cleaner(control_tokens, system_prompt)
                hashes.append(
                    _write_cleaned(_read_examples(*each, on_error, report, options), cleaner, seed, writer, report)
                )
        parts = _parts(hashes, eval_fraction)
        report.num_in_heldout = int((parts == _DROPPED).sum())
        if not (parts == _TRAIN).any():
            raise DataError(f"{source}: none of {report.num_rows} rows can be trained on. {report.drop_reasons()}")
        write_array(folder / _PARTS, parts)
        return report.counts()

    entry = cached(cache and cache / "examples", key, build)
    parts = read_array(entry.folder / _PARTS, np.uint8)
    examples = ExampleStore.open(entry.folder, entry.owner)
    train, heldout = (examples.select(np.flatnonzero(parts == part)) for part in (_TRAIN, _HELDOUT))
    return Splits(train, heldout, DataReport(**entry.values), key)


def heldout_source(source: str, eval_source: str, eval_split: str) -> str:
    """Returns the source of the held-out data; empty if a share of `source` is held out.

    Args:
        source, eval_source, eval_split: Settings as in `config.DataConfig`.
    """
    return eval_source or (source if eval_split else heldout_of(source))


def _read_examples(
    source: str, split: str, on_error: str, report: DataReport, options: RowOptions
) -> Iterator[Example]:
    def count_or_raise(error: DataError) -> None:
        if on_error == "raise":
            raise DataError(f"{error} (--on_error=skip skips such rows.)") from error
        report.num_unreadable += 1
        if len(report.errors) < _ERRORS_KEPT:
            report.errors.append(str(error))

    num_examples, num_unreadable, counter = 0, report.num_unreadable, RowCounter()
    for example in to_examples(read_rows(source, split, count_or_raise), count_or_raise, options, counter):
        num_examples += 1
        yield example
    report.num_rows += num_examples + report.num_unreadable - num_unreadable + counter.num_dropped
    report.count_row_changes(counter)
    if not num_examples:
        first = f" The first: {report.errors[0]}" if report.errors else ""
        raise DataError(f"{source}: none of {report.num_rows} rows can be used.{first}")


def _write_cleaned(
    examples: Iterator[Example], cleaner: Cleaner, seed: int, writer: ExampleWriter, report: DataReport
) -> np.ndarray:
    """Cleans a stream of examples, writes those that are kept, and returns the [n] uint64 hashes of their questions."""
    hashes = [np.empty(0, np.uint64)]
    with progress.track_progress("read rows") as advance:
        for chunk in in_chunks(examples):
            cleaned = cleaner.clean(chunk)
            writer.append(each.example for each in cleaned)
            hashes.append(np.array([question_hash(each.question_key, seed) for each in cleaned], np.uint64))
            advance(len(chunk))
    report.num_empty += cleaner.num_empty
    report.num_control_tokens += cleaner.num_control_tokens
    report.num_duplicates += cleaner.num_duplicates
    return np.concatenate(hashes)


def _parts(hashes: Sequence[np.ndarray], eval_fraction: float) -> np.ndarray:
    """Returns the [n] uint8 part that each example belongs to, from the question hashes of one or two sources."""
    train, *heldout = hashes
    if heldout:
        parts = np.where(np.isin(train, heldout[0]), _DROPPED, _TRAIN)
        return np.concatenate([parts, np.full(len(heldout[0]), _HELDOUT)]).astype(np.uint8)
    return np.where(heldout_by_question(train, eval_fraction), _HELDOUT, _TRAIN).astype(np.uint8)
