"""`gemma-tune eval`: scores a tuned model and its base model."""

from typing import Any

from gemma_tune.cli.flags import ADAPTER, setting_flags
from gemma_tune.cli.verb import Invocation, Verb
from gemma_tune.runtime.shell import gemma_tune_command


def _run(invocation: Invocation) -> dict[str, Any]:
    """Prints the metrics of base and tuned model side by side."""
    config, adapter = invocation.config(), invocation.flags.adapter
    from gemma_tune import pipeline
    from gemma_tune.cli.run_result import metrics_table

    comparison = pipeline.compare_with_base(config, adapter=adapter, data_is_given=invocation.is_given("data"))
    models = {"base model": comparison.base, "tuned model": comparison.tuned}
    title = f"{comparison.num_examples} examples of {comparison.data_source}"
    invocation.output.console.print(
        metrics_table(title, {name: metrics for name, metrics in models.items() if metrics})
    )
    return {
        "data": comparison.data_source,
        "num_examples": comparison.num_examples,
        "base": comparison.base,
        "tuned": comparison.tuned,
        "next": [gemma_tune_command("chat", model=config.model.source, adapter=adapter)],
    }


VERB = Verb(
    name="eval",
    usage="--model=WORKDIR [--data=FILE]",
    description="""Scores a tuned model and its base model on a file: loss, perplexity and token accuracy of the
    answers. --model is the workdir of a run, or a base model with --adapter. Without --data, a run is scored on what it
    held out.""",
    examples=(
        "gemma-tune eval --model=runs/mine",
        "gemma-tune eval --model=runs/mine --data=other_questions.jsonl",
        "gemma-tune eval --model=demo --adapter=runs/mine/adapter --data=sample:smartphone_support/heldout",
    ),
    flags=(
        *setting_flags("model"),
        ADAPTER,
        *setting_flags("data", "max_length", "batch_size", "mesh", "precision", "quantize", "block_size", "on_error",
                       "seed"),
    ),
    run=_run,
)  # fmt: skip
