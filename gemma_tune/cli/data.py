"""`gemma-tune data`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags as absl_flags
from rich import box
from rich.table import Table
from rich.text import Text

from gemma_tune.cli import flags
from gemma_tune.cli.output import Output
from gemma_tune.config import Config
from gemma_tune.data import DataReport, Example, TokenizedExample
from gemma_tune.errors import DataError

USAGE = "--data=FILE [--model=…] [--output=DIR]"
DESCRIPTION = """Shows what a model would learn from: examples as the model reads them, with the tokens that are
learnt in green, how long they are, and which rows are dropped and why. Trains nothing."""
EXAMPLES = (
    "gemma-tune data --data=questions.jsonl",
    "gemma-tune data --data='chats/*.jsonl.gz' --model=gemma3_1b --max_length=1024 --num_examples=5",
    "gemma-tune data --data=raw.csv --output=cleaned/",
)
_BARS = 12
_BAR_WIDTH = 40


def define_flags(values: absl_flags.FlagValues) -> None:
    """Defines the verb's flags."""
    flags.define(values, "data", "eval_data", "model", "max_length", "on_error", "seed")
    absl_flags.DEFINE_integer("num_examples", 3, "How many examples to show.", flag_values=values)
    absl_flags.DEFINE_string(
        "output", None, "Folder to write the cleaned train.jsonl and heldout.jsonl to.", flag_values=values
    )


def run(
    values: absl_flags.FlagValues, overrides: Sequence[str], positional: Sequence[str], output: Output
) -> dict[str, Any]:
    """Reads, cleans and tokenizes a data set and shows it."""
    del positional
    config = flags.to_config(values, overrides)
    from gemma_tune.data import template_for, tokenize_splits
    from gemma_tune.models.load import load_tokenizer
    from gemma_tune.pipeline import read_splits
    from gemma_tune.runtime.backend import cache_dir

    splits = read_splits(config)
    tokenizer, family = load_tokenizer(config.model.source)
    template, settings = template_for(family), config.data
    data = tokenize_splits(splits, template, tokenizer, settings.max_length, settings.overlong, cache=cache_dir())
    console = output.console
    console.print(
        f"{min(values.num_examples, len(data.train))} of {len(data.train)} training examples; what is learnt is "
        "green:\n"
    )
    for tokens in data.train[: values.num_examples]:
        console.print(render_tokens(tokens, tokenizer), soft_wrap=True)
        console.print()
    console.print(_histogram(data.report.lengths, config.data.max_length))
    console.print(_counts(data.report))
    for message in data.report.errors:
        console.print(f"  skipped: {message}", style="yellow", markup=False)
    written = _write(splits.train, splits.heldout, values.output) if values.output else []
    for path in written:
        console.print(f"wrote {path}", markup=False)
    output.next(_next_command(config, written))
    return {**data.report.to_dict(), "written": [str(path) for path in written]}


def render_tokens(tokens: TokenizedExample, tokenizer: Any) -> Text:
    """Returns the text of an example, learnt tokens in green, line ends and control tokens visible."""
    text = Text()
    for token, is_target in zip(tokens.token_ids.tolist(), tokens.is_target.tolist(), strict=True):
        piece = tokenizer.piece(token).replace("▁", " ").replace("\n", "⏎\n")
        is_control = piece.startswith("<") and piece.endswith(">")
        text.append(piece, style="bold green" if is_target else "magenta" if is_control else "dim")
    return text


def _histogram(lengths: np.ndarray, max_length: int) -> Table:
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // _BARS))
    counts = np.bincount((lengths - low) // width).tolist()
    table = Table(
        box=box.SIMPLE,
        title=f"Tokens in an example: {low} to {high}, mean {lengths.mean():.0f}",
        title_justify="left",
    )
    for name, justify in (("tokens", "right"), ("examples", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for index, count in enumerate(counts):
        first = low + index * width
        bar = "█" * round(_BAR_WIDTH * count / max(counts)) or ("▏" if count else "")
        style = "red" if first > max_length + 1 else ""
        table.add_row(f"{first}–{first + width - 1}", str(count), Text(bar), style=style)
    return table


def _counts(report: DataReport) -> Table:
    table = Table(box=box.SIMPLE, title="Rows", title_justify="left", show_header=False)
    for label, count, always in (
        ("read", report.num_rows, True),
        ("dropped: unreadable", report.num_unreadable, False),
        ("dropped: empty", report.num_empty, False),
        ("dropped: control tokens in the text", report.num_control_tokens, False),
        ("dropped: duplicates", report.num_duplicates, True),
        ("dropped from training: question is held out", report.num_in_heldout, False),
        ("dropped: too long", report.num_overlong_dropped, False),
        ("dropped: no answer fits behind the question", report.num_without_target, False),
        ("shortened to --max_length", report.num_truncated, True),
        ("for training", report.num_train, True),
        ("held out", report.num_heldout, True),
    ):
        if count or always:
            table.add_row(label, f"{count:,}")
    return table


def _write(train: Sequence[Example], heldout: Sequence[Example], folder: str) -> list[Path]:
    """Writes the cleaned splits in the chat format; they are read back as they are."""
    directory = Path(folder).expanduser()
    paths = []
    for name, examples in (("train", train), ("heldout", heldout)):
        path = directory / f"{name}.jsonl"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(_row(example), ensure_ascii=False) + "\n" for example in examples)
        except OSError as error:
            raise DataError(f"{path} can't be written: {error}.") from error
        paths.append(path)
    return paths


def _row(example: Example) -> dict[str, Any]:
    if example.turns[0].role == "text":
        return {"text": example.turns[0].content}
    roles = {"model": "assistant"}
    return {"messages": [{"role": roles.get(turn.role, turn.role), "content": turn.content} for turn in example.turns]}


def _next_command(config: Config, written: Sequence[Path]) -> str:
    if written:
        data = f"--data={written[0]} --eval_data={written[1]}"
    else:
        data = f"--data='{config.data.source}'"
    return f"gemma-tune train --model={config.model.source} {data} --workdir=runs/mine"
