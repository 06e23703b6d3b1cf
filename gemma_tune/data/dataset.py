"""From a source's name to tokenized training and held-out examples, with a count of everything that was dropped."""

import dataclasses
import statistics
from collections.abc import Sequence

from gemma_tune.data.chat_template import ChatTemplate
from gemma_tune.data.clean import Cleaned, clean, split_by_question, without_questions_of
from gemma_tune.data.example import Example, TokenizedExample, Tokenizer
from gemma_tune.data.formats import to_examples
from gemma_tune.data.sources import heldout_of, read_rows
from gemma_tune.data.tokenize import Tokenized, tokenize_examples
from gemma_tune.errors import DataError

_ERRORS_KEPT = 20


@dataclasses.dataclass
class DataReport:
    """What happened to the rows, in the order in which it happens. lengths are in tokens, before shortening."""

    num_rows: int = 0
    num_unreadable: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)  # The first unreadable rows' messages.
    num_empty: int = 0
    num_control_tokens: int = 0
    num_duplicates: int = 0
    num_in_heldout: int = 0
    num_truncated: int = 0
    num_overlong_dropped: int = 0
    num_without_target: int = 0
    num_train: int = 0
    num_heldout: int = 0
    lengths: list[int] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict:
        """Returns plain values, with the lengths summed up."""
        values = dataclasses.asdict(self)
        lengths = values.pop("lengths")
        if lengths:
            values["length_tokens"] = {
                "min": min(lengths),
                "mean": round(statistics.fmean(lengths), 1),
                "median": statistics.median(lengths),
                "max": max(lengths),
            }
        return values


@dataclasses.dataclass
class Splits:
    """Cleaned examples before tokenization."""

    train: list[Example]
    heldout: list[Example]
    report: DataReport


@dataclasses.dataclass
class PreparedData:
    """Tokenized examples, the conversations they come from (same order), and the report."""

    train: list[TokenizedExample]
    heldout: list[TokenizedExample]
    train_examples: list[Example]
    heldout_examples: list[Example]
    report: DataReport


def load_examples(source: str, split: str = "train", on_error: str = "raise") -> list[Example]:
    """Reads a source into Examples, as they stand in it.

    Args:
        source: As in `data.source`: files, globs, `tfds:name/config`, `sample:NAME`.
        split: Of a TFDS data set.
        on_error: `raise` at the first unreadable row, or `skip` such rows.

    Raises:
        DataError: Nothing there, or an unreadable row; says where, what was found and what to do.
    """
    return _load(source, split, on_error, DataReport())


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
) -> Splits:
    """Reads, cleans and splits. Arguments as in `config.DataConfig`; control_tokens as in `clean`."""
    report = DataReport()
    if not eval_source:
        eval_source = source if eval_split else heldout_of(source)
    cleaned = clean(_load(source, split, on_error, report), control_tokens, system_prompt)
    _count(cleaned, report)
    if eval_source:
        held = clean(_load(eval_source, eval_split or split, on_error, report), control_tokens, system_prompt)
        _count(held, report)
        heldout = held.examples
        train = without_questions_of(cleaned.examples, heldout)
        report.num_in_heldout = len(cleaned.examples) - len(train)
    else:
        train, heldout = split_by_question(cleaned.examples, eval_fraction, seed)
    if not train:
        raise DataError(f"{source}: no training examples are left of {report.num_rows} rows. {_reasons(report)}")
    return Splits(train, heldout, report)


def tokenize_splits(
    splits: Splits, template: ChatTemplate, tokenizer: Tokenizer, max_length: int, overlong: str
) -> PreparedData:
    """Tokenizes both parts.

    Raises:
        DataError: No training example has anything left to learn, or one is too long and `overlong` is `error`.
    """
    report = splits.report
    train = tokenize_examples(splits.train, template, tokenizer, max_length, overlong)
    heldout = tokenize_examples(splits.heldout, template, tokenizer, max_length, overlong)
    for part in (train, heldout):
        _count_tokenized(part, report)
    report.num_train, report.num_heldout = len(train.examples), len(heldout.examples)
    if not train.examples:
        raise DataError(
            f"All {len(splits.train)} training examples are too long for data.max_length={max_length}: no answer fits "
            "behind "
            f"its question, so there is nothing to learn. The shortest has {min(train.lengths)} tokens. Raise "
            "data.max_length."
        )
    return PreparedData(train.examples, heldout.examples, train.sources, heldout.sources, report)


def _load(source: str, split: str, on_error: str, report: DataReport) -> list[Example]:
    def count_or_raise(error: DataError) -> None:
        if on_error == "raise":
            raise DataError(f"{error} (--on_error=skip goes on without such rows.)") from error
        report.num_unreadable += 1
        if len(report.errors) < _ERRORS_KEPT:
            report.errors.append(str(error))

    before = report.num_unreadable
    examples = list(to_examples(read_rows(source, split, count_or_raise), count_or_raise))
    report.num_rows += len(examples) + report.num_unreadable - before
    if not examples:
        first = f" The first: {report.errors[0]}" if report.errors else ""
        raise DataError(f"{source}: none of {report.num_rows} rows can be used.{first}")
    return examples


def _count(cleaned: Cleaned, report: DataReport) -> None:
    report.num_empty += cleaned.num_empty
    report.num_control_tokens += cleaned.num_control_tokens
    report.num_duplicates += cleaned.num_duplicates


def _count_tokenized(part: Tokenized, report: DataReport) -> None:
    report.lengths += part.lengths
    report.num_truncated += part.num_truncated
    report.num_overlong_dropped += part.num_overlong_dropped
    report.num_without_target += part.num_without_target


def _reasons(report: DataReport) -> str:
    reasons = {
        "unreadable": report.num_unreadable,
        "empty": report.num_empty,
        "with control tokens": report.num_control_tokens,
        "duplicates": report.num_duplicates,
        "with a held-out question": report.num_in_heldout,
    }
    return "Dropped: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count) + "."
