"""`gemma-tune compare`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags
from rich import box
from rich.table import Table
from rich.text import Text

from gemma_tune.cli import flags
from gemma_tune.cli.output import Output, shorten

if TYPE_CHECKING:
    from gemma_tune.evaluation.comparison import FidelityReport

USAGE = "--reference=MODEL [--candidates=MODEL,…] --data=FILE"
DESCRIPTION = """Puts models side by side on your own held-out data: memory, how far each one's predictions are from the
reference's, loss, speed, and answers. A model is anything that --model takes elsewhere, with @int8, @int4 or @nf4
behind it to hold it in few bits. Writes a table, a picture and a report. Without --data, what the first run among the
models held out."""
EXAMPLES = (
    "gemma-tune compare --reference=demo --data=questions.jsonl",
    "gemma-tune compare --reference=runs/mine --candidates=runs/mine@nf4,runs/mine@int8",
    "gemma-tune compare --reference=gemma3_1b --candidates=gemma3_1b@int4,gemma3_270m --data=questions.jsonl",
)


def define_flags(values: absl_flags.FlagValues) -> None:
    """Defines the verb's flags."""
    from gemma_tune.evaluation.comparison import MAX_TOKENS, NUM_ANSWERS

    absl_flags.DEFINE_string(
        "reference", "demo", "What the others are compared with. (default: demo)", flag_values=values
    )
    absl_flags.DEFINE_string(
        "candidates",
        "",
        "Models with commas between, each with @int8, @int4 or @nf4 behind it or not. If not given, the reference in "
        "each of the three.",
        flag_values=values,
    )
    flags.define(
        values, "data", "max_length", "batch_size", "precision", "block_size", "max_new_tokens", "on_error", "seed"
    )
    absl_flags.DEFINE_integer(
        "max_tokens",
        MAX_TOKENS,
        f"Most tokens of answers to score; of more data, examples are drawn. (default: {MAX_TOKENS})",
        flag_values=values,
    )
    absl_flags.DEFINE_integer(
        "num_answers",
        NUM_ANSWERS,
        f"Questions that all models answer, each with its likeliest tokens. (default: {NUM_ANSWERS})",
        flag_values=values,
    )
    absl_flags.DEFINE_string(
        "output", "runs/comparison", "Folder for the files. (default: runs/comparison)", flag_values=values
    )


def run(
    values: absl_flags.FlagValues, overrides: Sequence[str], positional: Sequence[str], output: Output
) -> dict[str, Any]:
    """Compares, and prints the table and the answers."""
    del positional
    config = flags.to_config(values, overrides)
    from gemma_tune import pipeline
    from gemma_tune.evaluation.comparison import notes
    from gemma_tune.models.sources.source import parse_schemed

    report = pipeline.compare(
        values.reference,
        values.candidates,
        config.data.source if values["data"].present or values.config else "",
        config=config,
        max_tokens=values.max_tokens,
        num_answers=values.num_answers,
        output=values.output,
    )
    console = output.console
    console.print(_figures(report))
    for note in notes(report):
        console.print(note, style="dim", markup=False)
    _print_answers(report, output)
    if values.output:
        console.print(f"\nSaved in {values.output}: comparison.html, .png, .md and .json.", markup=False)
    first = parse_schemed(report.candidates[0].name)
    command = f"gemma-tune chat --model={first.source}" + (f" --quantize={first.scheme}" if first.scheme else "")
    output.next(command)
    return {**report.to_dict(), "output": values.output, "next": [command]}


def _figures(report: "FidelityReport") -> Table:
    from gemma_tune.evaluation.comparison import figure_rows, short_name

    table = Table(box=box.SIMPLE_HEAD, title=Text(report.scope), title_justify="left", collapse_padding=True)
    table.add_column("", no_wrap=True)
    for model in report.models:
        style = "" if model.divergence else "dim"
        name = short_name(model.name)
        header = Text(name if model.divergence else f"{name}\nreference")
        table.add_column(header, justify="right", overflow="fold", style=style, header_style=style or "bold")
    for label, texts in figure_rows(report):
        table.add_row(label, *texts)
    return table


def _print_answers(report: "FidelityReport", output: Output) -> None:
    """Prints the answers below one another; bold from where one parts from the reference's."""
    from gemma_tune.evaluation.comparison import short_name
    from gemma_tune.evaluation.comparison_report import where_they_part

    console = output.console
    for index, question in enumerate(report.questions):
        table = Table(box=None, show_header=False, title=Text(question), title_style="bold", title_justify="left")
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        table.add_row("wanted", Text(shorten(report.wanted_answers[index]), style="green"))
        reference = shorten(report.reference.answers[index])
        for model in report.models:
            text = Text(shorten(model.answers[index]))
            text.stylize("bold", where_they_part(text.plain, reference))
            table.add_row(Text(short_name(model.name)), text)
        console.print()
        console.print(table)
