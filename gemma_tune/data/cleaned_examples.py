"""Reads the sources of a data set, cleans their examples and writes them to disk, as one stream."""

import operator
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from gemma_tune.data.chunks import in_chunks
from gemma_tune.data.cleaning import Cleaner
from gemma_tune.data.cleaning_report import DataReport
from gemma_tune.data.example import Example
from gemma_tune.data.heldout_split import question_hash
from gemma_tune.data.rows.row_options import RowCounter, RowOptions
from gemma_tune.data.sources.readers import read_rows
from gemma_tune.data.sources.row_formats import to_examples
from gemma_tune.data.storage.example_store import ExampleWriter
from gemma_tune.errors import DataError
from gemma_tune.runtime import progress

_ERRORS_KEPT = 20
_NUM_CHARACTERS = operator.attrgetter("num_characters")


class NamedSplit(NamedTuple):
    """One source of a data set.

    Attributes:
        name: Name of the source, as in `read_rows`.
        split: Split of a TFDS data set.
    """

    name: str
    split: str


class ExampleHashes(NamedTuple):
    """The hashes of n examples.

    Attributes:
        questions: [n] uint64 hashes of their questions, by which the data is split.
        contents: [n] uint64 hashes of all of their text, by which duplicates are recognized.
    """

    questions: np.ndarray
    contents: np.ndarray


class CleanedExamplesWriter:
    """Writes the cleaned examples of one or several groups of sources.

    Args:
        examples: Writer of the examples.
        source_numbers: File for the number of each example's source, as uint16.
        report: Report that counts what is read and dropped.
        on_error: Treatment of unreadable rows: `raise` or `skip`.
        seed: Random seed of the split.
        options: Settings of how rows become turns.
    """

    def __init__(
        self,
        examples: ExampleWriter,
        source_numbers: BinaryIO,
        report: DataReport,
        on_error: str,
        seed: int,
        options: RowOptions,
    ):
        self._examples, self._source_numbers, self._report = examples, source_numbers, report
        self._on_error, self._seed, self._options = on_error, seed, options

    def write_group(self, sources: Sequence[NamedSplit], cleaner: Cleaner) -> ExampleHashes:
        """Writes the examples of some sources, among which no duplicate is left.

        Raises:
            DataError: A source doesn't exist, a row is unreadable, or no row can be used.
        """
        report, first = self._report, len(self._report.sources)
        num_usable, num_errors = _num_usable(report), len(report.errors)
        hashes = [self._write_source(source, cleaner) for source in sources]
        if _num_usable(report) == num_usable:
            raise _nothing_usable(report.sources[first:], report.errors[num_errors:], report.num_labelled_bad)
        for reason, samples in cleaner.samples.items():
            report.add_samples(f"num_{reason}", samples)
        return ExampleHashes(*(np.concatenate(arrays) for arrays in zip(*hashes, strict=True)))

    def _write_source(self, source: NamedSplit, cleaner: Cleaner) -> ExampleHashes:
        report = self._report
        rows_before, usable_before, counts_before = report.num_rows, _num_usable(report), dict(cleaner.counts)
        questions, contents = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        number = len(report.sources)
        with progress.track_progress("read rows") as advance:
            for chunk in in_chunks(_read_source(source, self._on_error, report, self._options), _NUM_CHARACTERS):
                cleaned = cleaner.clean(chunk)
                self._examples.append(each.example for each in cleaned)
                self._source_numbers.write(np.full(len(cleaned), number, np.uint16).data)
                questions.append(
                    np.array([question_hash(each.question_key, self._seed) for each in cleaned], np.uint64)
                )
                contents.append(np.array([each.content_hash for each in cleaned], np.uint64))
                advance(len(chunk))
        num_rows = report.num_rows - rows_before
        num_unusable = num_rows - (_num_usable(report) - usable_before)
        num_dropped = num_unusable + report.count_cleaned(cleaner, counts_before)
        report.sources.append({"name": source.name, "num_rows": num_rows, "num_dropped": num_dropped})
        return ExampleHashes(np.concatenate(questions), np.concatenate(contents))


def read_examples(names: Sequence[str], split: str, on_error: str, options: RowOptions) -> list[Example]:
    """Returns all examples of some sources, without cleaning them. Raises what `write_group` does."""
    report = DataReport()
    sources = [NamedSplit(name, split) for name in names]
    examples = [example for source in sources for example in _read_source(source, on_error, report, options)]
    if not examples:
        raise _nothing_usable(
            [{"name": ",".join(names), "num_rows": report.num_rows}], report.errors, report.num_labelled_bad
        )
    return examples


def _read_source(source: NamedSplit, on_error: str, report: DataReport, options: RowOptions) -> Iterator[Example]:
    def count_or_raise(error: DataError) -> None:
        if on_error == "raise":
            raise DataError(f"{error} (--on_error=skip skips such rows.)") from error
        report.num_unreadable += 1
        if len(report.errors) < _ERRORS_KEPT:
            report.errors.append(str(error))

    num_examples, num_unreadable, counter = 0, report.num_unreadable, RowCounter()
    rows = read_rows(source.name, source.split, count_or_raise, report.add_note)
    for example in to_examples(rows, count_or_raise, options, counter):
        num_examples += 1
        yield example
    report.num_rows += num_examples + report.num_unreadable - num_unreadable + counter.num_dropped
    report.count_row_changes(counter, with_notes=not source.name.startswith("sample:"))  # Nobody can change a sample.


def _num_usable(report: DataReport) -> int:
    """Returns the number of rows so far that became examples."""
    return report.num_rows - report.num_unreadable - report.num_labelled_bad


def _nothing_usable(sources: Sequence[dict], errors: Sequence[str], num_labelled_bad: int) -> DataError:
    names, num_rows = ",".join(each["name"] for each in sources), sum(each["num_rows"] for each in sources)
    first = f" The first: {errors[0]}" if errors else ""
    if num_labelled_bad:
        first += f" {num_labelled_bad} are labelled as bad answers, which are not learnt."
    return DataError(f"{names}: none of {num_rows} rows can be used.{first}")
