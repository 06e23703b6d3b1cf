"""`gemma-tune data`: what a model would learn from a data set."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from gemma_tune.cli.flags import setting_flags
from gemma_tune.cli.output import make_listing
from gemma_tune.cli.verb import Flag, Invocation, Verb
from gemma_tune.config import Config
from gemma_tune.data import DataReport, Example, TokenizedExample
from gemma_tune.data.rows.written_rows import chat_row
from gemma_tune.errors import DataError
from gemma_tune.runtime.atomic_files import disk_errors_as, write_lines
from gemma_tune.runtime.shell import gemma_tune_command

_MAX_BARS = 10
_BAR_WIDTH = 40


def _run(invocation: Invocation) -> dict[str, Any]:
    """Reads, cleans and tokenizes a data set and shows it."""
    flags, console, config = invocation.flags, invocation.output.console, invocation.config()
    from gemma_tune.data import template_for, tokenize_splits
    from gemma_tune.models.load import load_tokenizer
    from gemma_tune.pipeline import read_splits
    from gemma_tune.runtime.backend import cache_dir

    splits = read_splits(config)
    tokenizer, family = load_tokenizer(config.model.source)
    template, settings = template_for(family, tokenizer), config.data
    data = tokenize_splits(splits, template, tokenizer, settings.max_length, settings.overlong, cache=cache_dir())
    num_shown = min(flags.num_examples, len(data.train))
    console.print(f"{num_shown} of {len(data.train)} training examples. What the model learns is green:\n")
    for tokens in data.train[:num_shown]:
        console.print(render_tokens(tokens, tokenizer), soft_wrap=True)
        console.print()
    console.print(length_histogram(data.report.lengths, settings.max_length))
    console.print(_counts(data.report))
    for note in data.report.notes:
        console.print(f"  note: {note}", style="yellow", markup=False)
    for message in data.report.errors:
        console.print(f"  skipped: {message}", style="yellow", markup=False)
    written = _write(splits.train, splits.heldout, flags.output) if flags.output else []
    for path in written:
        console.print(f"Wrote {path}.", markup=False)
    return {
        **data.report.to_dict(),
        "written": [str(path) for path in written],
        "next": [_train_command(config, written)],
    }


def render_tokens(tokens: TokenizedExample, tokenizer: Any) -> Text:
    """Returns the text of an example: learnt tokens in green, line ends and control tokens visible."""
    text = Text()
    for token, is_target in zip(tokens.token_ids.tolist(), tokens.is_target.tolist(), strict=True):
        piece = tokenizer.piece(token).replace("▁", " ").replace("\n", "⏎\n")
        is_control = piece.startswith("<") and piece.endswith(">")
        text.append(piece, style="bold green" if is_target else "magenta" if is_control else "dim")
    return text


def length_histogram(lengths: np.ndarray, max_length: int) -> RenderableType:
    """Returns a histogram of at most ten rows, or a sentence where all lengths are equal.

    Args:
        lengths: [n] tokens in each example.
        max_length: Maximum length of an example; rows beyond it are red.
    """
    low, high = int(lengths.min()), int(lengths.max())
    if low == high:
        return Text(f" All examples have {low} tokens.")
    width = -(-(high - low + 1) // _MAX_BARS)
    counts = np.bincount((lengths - low) // width).tolist()
    table = make_listing(f"Tokens in an example: {low} to {high}, mean {lengths.mean():.0f}")
    table.show_header = True
    table.add_column("tokens", justify="right")
    table.add_column("examples", justify="right")
    table.add_column("")
    for index, count in enumerate(counts):
        first = low + index * width
        last = min(first + width - 1, high)
        bar = "█" * round(_BAR_WIDTH * count / max(counts)) or ("▏" if count else "")
        label = f"{first}–{last}" if last > first else f"{first}"
        table.add_row(label, f"{count:,}", Text(bar), style="red" if first > max_length + 1 else "")
    return table


def _counts(report: DataReport) -> Table:
    """Returns the numbers of rows; reasons that dropped none are left out."""
    table = make_listing("Rows")
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "read": report.num_rows,
        "dropped: unreadable": report.num_unreadable,
        "dropped: empty": report.num_empty,
        "dropped: contain control tokens": report.num_control_tokens,
        "dropped: duplicates": report.num_duplicates,
        "dropped: question is held out": report.num_in_heldout,
        "dropped: too long": report.num_overlong_dropped,
        "dropped: question leaves no room for the answer": report.num_without_target,
        "shortened to --max_length": report.num_truncated,
        "for training": report.num_train,
        "held out": report.num_heldout,
    }
    for label, count in rows.items():
        if count or label in ("read", "for training", "held out"):
            table.add_row(label, f"{count:,}")
    for label, count in report.row_change_reasons().items():
        table.add_row(label, f"{count:,}", style="dim")
    return table


def _write(train: Sequence[Example], heldout: Sequence[Example], folder: str) -> list[Path]:
    """Writes the cleaned splits in the chat format, so that they are read back as they are."""
    directory = Path(folder).expanduser()
    paths = []
    for name, examples in (("train", train), ("heldout", heldout)):
        path = directory / f"{name}.jsonl"
        with disk_errors_as(DataError, path):
            directory.mkdir(parents=True, exist_ok=True)
            write_lines(path, (json.dumps(chat_row(example), ensure_ascii=False) for example in examples))
        paths.append(path)
    return paths


def _train_command(config: Config, written: Sequence[Path]) -> str:
    data, eval_data = written or (config.data.source, config.data.eval_source)
    # What was written is read without them.
    rows = {} if written else {"columns": ",".join(config.data.columns), "prompt_template": config.data.prompt_template}
    default = Config().data
    for name in ("on_role_order", "thoughts"):
        if getattr(config.data, name) != getattr(default, name):
            rows[name] = getattr(config.data, name)
    return gemma_tune_command(
        "train", model=config.model.source, data=data, eval_data=eval_data, **rows, workdir="runs/mine"
    )


VERB = Verb(
    name="data",
    usage="--data=FILE [--model=…] [--output=DIR]",
    description="""Shows what a model would learn from a data set: examples as the model reads them, with the tokens
    that it learns in green, how long they are, and which rows are dropped and why. Trains nothing.""",
    examples=(
        "gemma-tune data --data=questions.jsonl",
        "gemma-tune data --data='chats/*.jsonl.gz' --model=gemma3_1b --max_length=1024 --num_examples=5",
        "gemma-tune data --data=raw.csv --output=cleaned/",
    ),
    flags=(
        *setting_flags("data", "eval_data", "model", "max_length", "on_error"),
        *setting_flags("columns", "prompt_template", "on_role_order", "thoughts"),
        Flag("num_examples", "Number of examples to show.", 3),
        Flag("output", "Folder to write the cleaned train.jsonl and heldout.jsonl to."),
        *setting_flags("seed"),
    ),
    run=_run,
)
