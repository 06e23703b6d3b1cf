"""`gemma-tune compare`: several models on the same data."""

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from gemma_tune.cli.flags import setting_flags
from gemma_tune.cli.output import Output, shorten
from gemma_tune.cli.verb import Flag, Invocation, Verb
from gemma_tune.evaluation.comparison_figures import (
    MAX_TOKENS,
    NUM_ANSWERS,
    FidelityReport,
    figure_rows,
    notes,
    short_name,
)
from gemma_tune.evaluation.comparison_report import first_difference
from gemma_tune.models.sources.source import parse_schemed
from gemma_tune.runtime.shell import gemma_tune_command


def _run(invocation: Invocation) -> dict[str, Any]:
    """Compares, and prints the table and the answers."""
    flags, output, config = invocation.flags, invocation.output, invocation.config()
    from gemma_tune import pipeline

    report = pipeline.compare(
        flags.reference,
        flags.candidates,
        config.data.source if invocation.is_given("data") else "",
        config=config,
        max_tokens=flags.max_tokens,
        num_answers=flags.num_answers,
        output=flags.output,
    )
    output.console.print(_table(report))
    for note in notes(report):
        output.console.print(note, style="dim", markup=False)
    _print_answers(report, output)
    if flags.output:
        output.console.print(f"\nSaved in {flags.output}: comparison.html, .png, .md and .json.", markup=False)
    first = parse_schemed(report.candidates[0].name)
    command = gemma_tune_command("chat", model=first.source, quantize=first.scheme)
    return {**report.to_dict(), "output": flags.output, "next": [command]}


def _table(report: FidelityReport) -> Table:
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


def _print_answers(report: FidelityReport, output: Output) -> None:
    """Prints all answers to a question below one another; bold from where one differs from the reference's."""
    for index, question in enumerate(report.questions):
        table = Table(box=None, show_header=False, title=Text(question), title_style="bold", title_justify="left")
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        table.add_row("wanted", Text(shorten(report.wanted_answers[index]), style="green"))
        reference = shorten(report.reference.answers[index])
        for model in report.models:
            text = Text(shorten(model.answers[index]))
            text.stylize("bold", first_difference(text.plain, reference))
            table.add_row(Text(short_name(model.name)), text)
        output.console.print()
        output.console.print(table)


VERB = Verb(
    name="compare",
    usage="--reference=MODEL [--candidates=MODEL,…] [--data=FILE]",
    description="""Compares models on your own held-out data: memory, distance of each one's predictions from the
    reference's, loss, speed, and answers. A model is anything that --model takes elsewhere; @int8, @int4 or @nf4 behind
    it quantizes it. Writes a table, a chart and a report. Without --data, the models are compared on what the first run
    among them held out.""",
    examples=(
        "gemma-tune compare --reference=demo --data=questions.jsonl",
        "gemma-tune compare --reference=runs/mine --candidates=runs/mine@nf4,runs/mine@int8",
        "gemma-tune compare --reference=gemma3_1b --candidates=gemma3_1b@int4,gemma3_270m --data=questions.jsonl",
    ),
    flags=(
        Flag("reference", "Model that the others are compared with.", "demo", "Model"),
        Flag(
            "candidates",
            "Models with commas between. Without it, the reference in int8, int4 and nf4.",
            group="Model",
        ),
        *setting_flags(
            "precision",
            "block_size",
            "data",
            "max_length",
            "batch_size",
            "on_error",
            "columns",
            "prompt_template",
            "max_new_tokens",
        ),
        Flag(
            "max_tokens",
            "Maximum number of answer tokens to score. From more data, examples are drawn at random.",
            MAX_TOKENS,
            "Data",
        ),
        Flag("num_answers", "Number of questions that all models answer, without sampling.", NUM_ANSWERS, "Generation"),
        Flag("output", "Folder for the files.", "runs/comparison"),
        *setting_flags("seed"),
    ),
    run=_run,
)
