"""`gemma-tune eval`."""

from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags
from rich import box
from rich.table import Table

from gemma_tune.cli import flags
from gemma_tune.cli.output import Output

USAGE = "--model=WORKDIR --data=FILE"
DESCRIPTION = """Scores a tuned model and its base on a file: loss, perplexity and token accuracy over the answers.
--model is the workdir of a run, or a base model with --adapter. Without --data, a run is scored on what it held
out."""
EXAMPLES = (
    "gemma-tune eval --model=runs/mine",
    "gemma-tune eval --model=runs/mine --data=other_questions.jsonl",
    "gemma-tune eval --model=demo --adapter=runs/mine/adapter --data=sample:smartphone_support/heldout",
)


_FLAGS = (
    "model", "data", "max_length", "batch_size", "mesh", "precision", "quantize", "block_size", "on_error", "seed",
)  # fmt: skip


def define_flags(values: absl_flags.FlagValues) -> None:
    """Defines the verb's flags."""
    flags.define(values, *_FLAGS)
    absl_flags.DEFINE_string("adapter", "", "A LoRA adapter to put on --model.", flag_values=values)


def run(
    values: absl_flags.FlagValues, overrides: Sequence[str], positional: Sequence[str], output: Output
) -> dict[str, Any]:
    """Prints base and tuned side by side."""
    del positional
    config = flags.to_config(values, overrides)
    from gemma_tune import pipeline

    data_is_given = bool(values["data"].present or values.config)
    comparison = pipeline.compare_with_base(config, adapter=values.adapter, data_is_given=data_is_given)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{comparison.num_examples} examples of {comparison.data_source}",
        title_justify="left",
    )
    table.add_column("")
    columns = {
        name: figures
        for name, figures in (("base model", comparison.base), ("tuned model", comparison.tuned))
        if figures
    }
    for name in columns:
        table.add_column(name, justify="right")
    for key, label, style in (
        ("loss", "loss", ".4f"),
        ("perplexity", "perplexity", ".2f"),
        ("token_accuracy", "token accuracy", ".1%"),
    ):
        table.add_row(label, *(format(figures[key], style) for figures in columns.values()))
    output.console.print(table)
    command = f"gemma-tune chat --model={config.model.source}" + (
        f" --adapter={values.adapter}" if values.adapter else ""
    )
    output.next(command)
    return {
        "data": comparison.data_source,
        "num_examples": comparison.num_examples,
        "base": comparison.base,
        "tuned": comparison.tuned,
        "next": [command],
    }
