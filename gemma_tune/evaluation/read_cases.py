"""Reads the questions of an evaluation from data, with all columns of their rows."""

from collections.abc import Iterable, Sequence

from gemma_tune.data import Example
from gemma_tune.data.example import MODEL_STEPS, Row, Turn
from gemma_tune.data.mixture import parse_mixture
from gemma_tune.data.rows.row_options import RowOptions
from gemma_tune.data.sources.readers import read_rows
from gemma_tune.data.sources.row_formats import to_conversation
from gemma_tune.errors import DataError
from gemma_tune.evaluation.case import EvalCase


def read_cases(
    source: str, split: str = "train", on_error: str = "raise", options: RowOptions | None = None
) -> list[EvalCase]:
    """Reads the conversations of a source; documents are left out. A row without a wanted answer has the reference ''.

    Args:
        source: Source of the data, as in `data.source`.
        split: Split to read of a data set that has several.
        on_error: Treatment of unreadable rows: `raise` or `skip`.
        options: Settings of how rows become turns; None: the defaults.

    Raises:
        DataError: The source doesn't exist, or a row is unreadable.
    """
    cases = []

    def skip_or_raise(error: DataError) -> None:
        if on_error == "raise":
            raise DataError(f"{error} (--on_error=skip skips such rows.)") from error

    for row in (row for part in parse_mixture(source) for row in read_rows(part.source, split, skip_or_raise)):
        try:
            turns = to_conversation(row, options)
        except DataError as error:
            skip_or_raise(error)
            continue
        if turns[0].role != "text":
            cases.append(_case(turns, row))
    return cases


def cases_of(examples: Iterable[Example], rows: Iterable[Row]) -> list[EvalCase]:
    """Returns the cases of cleaned examples that end with an answer, with the columns of the rows that they come from.

    Args:
        examples: Conversations; documents are left out.
        rows: Rows of their source, in any order, found by their origin.
    """
    asked = [example for example in examples if example.turns[-1].role in MODEL_STEPS]
    origins = {example.origin for example in asked}
    columns = {row.origin: row.fields for row in rows if row.origin in origins}
    return [
        EvalCase(example.prompt, example.answer, columns.get(example.origin, {}), example.origin) for example in asked
    ]


def _case(turns: Sequence[Turn], row: Row) -> EvalCase:
    example = Example(tuple(turns))
    return EvalCase(example.prompt, example.answer, row.fields, row.origin)
