"""Prints the result of a training run."""

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from gemma_tune.cli.output import Output, make_table, shorten
from gemma_tune.evaluation.heldout import HELDOUT_LABELS
from gemma_tune.models.sources.source import source_of_folder
from gemma_tune.pipeline import RunResult
from gemma_tune.runtime.shell import gemma_tune_command


def metrics_table(title: str, models: Mapping[str, Mapping[str, float]]) -> Table:
    """Returns loss, perplexity, token accuracy and metrics of answers of models side by side.

    Args:
        title: Title of the table.
        models: Metrics by the name of the model.
    """
    table = make_table(title, "", *models)
    for name, label, style in HELDOUT_LABELS:
        table.add_row(label, *(format(metrics[name], style) for metrics in models.values()))
    known = [name for name, _, _ in HELDOUT_LABELS] + ["num_tokens"]
    others = dict.fromkeys(name for metrics in models.values() for name in metrics if name not in known)
    for name in others:
        table.add_row(name, *(f"{metrics[name]:.3f}" if name in metrics else "–" for metrics in models.values()))
    return table


def show_run_result(result: RunResult, output: Output) -> None:
    """Prints held-out metrics before and after, answers side by side, and where everything was saved."""
    console = output.console
    if result.before and result.after:
        console.print(metrics_table("Held-out questions", {"base model": result.before, "tuned model": result.after}))
    if result.samples:
        console.print(_answers(result))
    if result.best_by != "loss":
        console.print(f"The saved weights are those of step {result.best_step}, the best by {result.best_by}.")
    if result.scores:
        right = sum(score.is_right for score in result.scores)
        console.print(
            f"{right} of {len(result.scores)} held-out questions got an answer that is close to the wanted one, and "
            "closer than to any other question's."
        )
    if result.num_skipped_steps:
        console.print(
            f"{result.num_skipped_steps} of {result.num_steps} steps were skipped because their gradients overflowed "
            "float16. A few such steps are normal while the loss scale adapts."
        )
    console.print(f"\nSaved in {result.workdir}:", markup=False)
    for path, what in (
        (result.saved_to.relative_to(result.workdir), "the trained weights"),
        ("report.html", "curves, metrics and answers, for a browser"),
        (
            f"metrics.jsonl{', tensorboard/' if (result.workdir / 'tensorboard').exists() else ''}",
            "metrics of every step",
        ),
        ("checkpoints/", "for resuming the run"),
    ):
        console.print(f"  {path!s:<30}{what}", markup=False)


def _answers(result: RunResult) -> Table:
    table = make_table("Answers to held-out questions", show_lines=True, expand=True)
    table.add_column("question", ratio=3)
    table.add_column("base model", ratio=4, style="dim")
    table.add_column("tuned model", ratio=4)
    for sample in result.samples:
        table.add_row(Text(sample.question), Text(shorten(sample.base_answer)), Text(shorten(sample.tuned_answer)))
    return table


def next_commands(result: RunResult) -> list[str]:
    """Returns the commands to run after training."""
    question = result.samples[0].question if result.samples else "…"
    source = source_of_folder(result.workdir)
    return [gemma_tune_command("chat", model=source), gemma_tune_command("generate", question, model=source)]
