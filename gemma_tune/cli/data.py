"""`gemma-tune data`: what a model would learn from a data set."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gemma_tune.cli.data_tables import (
    length_histogram,
    render_tokens,
    repeats_advice,
    rows_table,
    sources_table,
)
from gemma_tune.cli.flags import setting_by_flag, setting_flags
from gemma_tune.cli.verb import Flag, Invocation, Verb
from gemma_tune.config import Config
from gemma_tune.data import DataReport, Example
from gemma_tune.data.rows.written_rows import chat_row
from gemma_tune.errors import DataError
from gemma_tune.runtime.atomic_files import disk_errors_as, write_lines
from gemma_tune.runtime.shell import gemma_tune_command
from gemma_tune.settings import flatten

# Settings that the rows of --output no longer need.
_IN_WRITTEN_ROWS = ("data.columns", "data.prompt_template")


def _run(invocation: Invocation) -> dict[str, Any]:
    """Reads, cleans and tokenizes a data set and shows it."""
    flags, console, config = invocation.flags, invocation.output.console, invocation.config()
    from gemma_tune.cli.data_page import DataPage, write_data_page
    from gemma_tune.data import template_for, tokenize_splits
    from gemma_tune.models.load import load_tokenizer
    from gemma_tune.pipeline import mixture_counts, read_splits
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
    counts = mixture_counts(config, data).tolist()
    _print_report(data.report, counts, settings.max_length, console)
    written = _write(splits.train, splits.heldout, flags.output) if flags.output else []
    if flags.save_report:
        page = DataPage(config, data, splits, counts, tokenizer)
        written_page = write_data_page(Path(flags.save_report).expanduser(), page)
        console.print(f"Wrote {written_page}.", markup=False)
    for path in written:
        console.print(f"Wrote {path}.", markup=False)
    return {
        **data.report.to_dict(),
        "dropped_samples": data.report.samples,
        "examples_per_epoch": counts,
        "written": [str(path) for path in written],
        "next": [_train_command(config, written)],
    }


def _print_report(report: DataReport, counts: Sequence[int], max_length: int, console: Console) -> None:
    """Prints how long the examples are, and what became of the rows of each source."""
    console.print(length_histogram(report.lengths, max_length))
    console.print(rows_table(report))
    if report.num_tokens_lost:
        console.print(f"  {report.tokens_lost()}", style="yellow" if report.loses_much else "", markup=False)
    if len(report.sources) > 1:
        console.print(sources_table(report, counts))
    if advice := repeats_advice(report, counts):
        console.print(f"  {advice}", style="yellow", markup=False)
    for note in report.notes:
        console.print(f"  note: {note}", style="yellow", markup=False)
    for message in report.errors:
        console.print(f"  skipped: {message}", style="yellow", markup=False)


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
    """Returns the command that trains on the same data in the same way."""
    settings, defaults = flatten(config.to_dict()), flatten(Config().to_dict())
    flags = {path: name for name, path in setting_by_flag().items()}
    changed = {
        flags.get(path, f"config.{path}"): ",".join(value) if isinstance(value, tuple | list) else value
        for path, value in settings.items()
        if path.startswith("data.")
        and not path.endswith("source")
        and value != defaults[path]
        and not (written and path in _IN_WRITTEN_ROWS)
    }
    data, eval_data = written or (config.data.source, config.data.eval_source)
    model, workdir = config.model.source, "runs/mine"
    return gemma_tune_command("train", model=model, data=data, eval_data=eval_data, **changed, workdir=workdir)


VERB = Verb(
    name="data",
    usage="--data=FILE [--model=…] [--output=DIR]",
    description="""Shows what a model would learn from a data set: examples as the model reads them, with the tokens
    that it learns in green, how long they are, and which rows are dropped and why. Trains nothing.""",
    examples=(
        "gemma-tune data --data=questions.jsonl",
        "gemma-tune data --data='chats/*.jsonl.gz' --model=gemma3_1b --max_length=1024 --num_examples=5",
        "gemma-tune data --data=raw.csv --output=cleaned/",
        "gemma-tune data --data=support.jsonl:0.7,manual.jsonl:0.3 --save_report=data.html",
    ),
    flags=(
        *setting_flags("data", "eval_data", "model", "max_length", "overlong", "dedup"),
        *setting_flags("near_dedup_threshold", "on_error"),
        *setting_flags("columns", "prompt_template", "on_role_order", "thoughts"),
        Flag("num_examples", "Number of examples to show.", 3),
        Flag("output", "Folder to write the cleaned train.jsonl and heldout.jsonl to."),
        Flag("save_report", "HTML file for what is kept and dropped, with lengths by source and samples."),
        *setting_flags("seed"),
    ),
    run=_run,
)
