"""Prints what a run came to."""

from rich import box
from rich.table import Table
from rich.text import Text

from gemma_tune.cli.output import Output, shorten
from gemma_tune.pipeline import RunResult


def show_result(result: RunResult, output: Output) -> None:
    """Prints held-out values before and after, answers side by side, and where everything is."""
    console = output.console
    if result.before and result.after:
        table = Table(box=box.SIMPLE_HEAD, title="Held-out questions", title_justify="left")
        table.add_column("")
        for name in ("base model", "tuned model"):
            table.add_column(name, justify="right")
        for name, label, style in (
            ("loss", "loss", ".4f"),
            ("perplexity", "perplexity", ".2f"),
            ("token_accuracy", "token accuracy", ".1%"),
        ):
            table.add_row(label, format(result.before[name], style), format(result.after[name], style))
        console.print(table)
    if result.samples:
        console.print(_answers(result))
    if result.scores:
        right = sum(score.is_right for score in result.scores)
        console.print(f"{right} of {len(result.scores)} held-out questions are answered with their own answer.")
    if result.num_skipped_steps:
        console.print(
            f"{result.num_skipped_steps} of {result.num_steps} steps were skipped, since float16 couldn't hold their "
            "gradients: a few are usual, while the loss scale is found."
        )
    console.print(f"\nSaved in {result.workdir}:")
    for path, what in (
        (result.saved_to.relative_to(result.workdir), "what was learnt"),
        ("report.html", "curves, figures and answers, for a browser"),
        ("metrics.jsonl, tensorboard/", "every step"),
        ("checkpoints/", "to go on with"),
    ):
        console.print(f"  {path!s:<30}{what}", markup=False)


def _answers(result: RunResult) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, show_lines=True, title="Answers to held-out questions", title_justify="left", expand=True
    )
    table.add_column("question", ratio=3)
    table.add_column("base model", ratio=4, style="dim")
    table.add_column("tuned model", ratio=4)
    for sample in result.samples:
        table.add_row(Text(sample.question), Text(shorten(sample.base_answer)), Text(shorten(sample.tuned_answer)))
    return table


def next_commands(result: RunResult) -> list[str]:
    """Returns the commands one would run next."""
    question = result.samples[0].question if result.samples else "…"
    quoted = question.replace('"', "'")
    return [f"gemma-tune chat --model={result.workdir}", f'gemma-tune generate --model={result.workdir} "{quoted}"']
