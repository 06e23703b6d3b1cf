"""`gemma-tune train --dry_run`: everything that can be known before the first step."""

from typing import Any

import jax
from rich import box
from rich.table import Table

from gemma_tune.cli.data import render_tokens
from gemma_tune.cli.output import Output
from gemma_tune.config import Config
from gemma_tune.models.functional import parameters
from gemma_tune.models.tokenizer import tokenizer_of
from gemma_tune.pipeline import read_splits, set_up
from gemma_tune.settings import flatten

_NUM_EXAMPLES = 3


def dry_run(config: Config, output: Output) -> dict[str, Any]:
    """Shows rendered examples, parameters, steps, and the compiled step's memory. Writes nothing and trains nothing."""
    console = output.console
    setup = set_up(config, read_splits(config))
    tokenizer = tokenizer_of(setup.model)
    console.print("Examples; what is learnt is green:\n")
    for example in setup.data.train[:_NUM_EXAMPLES]:
        console.print(render_tokens(example, tokenizer), soft_wrap=True)
        console.print()
    groups = parameters(setup.model)
    trainable, frozen = (sum(value.size for value in group.values()) for group in groups)
    memory = compiled_memory(setup)
    batches, train = setup.batches, setup.data.train
    num_tokens = int(train.counts.num_tokens.sum())
    num_positions = batches.steps_per_epoch * batches.batch_size * batches.row_length
    shape = f"{batches.batch_size} × {batches.row_length} tokens"
    rows = {
        "training examples": f"{len(train):,} ({num_tokens:,} tokens)",
        "held-out examples": f"{len(setup.data.heldout):,}",
        "trained parameters": f"{trainable:,} of {trainable + frozen:,} ({trainable / (trainable + frozen):.2%})",
        "steps": f"{len(batches):,} of {shape} ({batches.steps_per_epoch} an epoch)",
        "filled positions": f"{num_tokens / num_positions:.0%}",
        "memory of a step": f"{memory['total_bytes'] / 1e9:.2f} GB: weights and state "
        f"{memory['argument_bytes'] / 1e9:.2f}, while computing {memory['temporary_bytes'] / 1e9:.2f}",
    }
    table = Table(box=box.SIMPLE, show_header=False)
    for label, text in rows.items():
        table.add_row(label, text)
    console.print(table)
    for path, value in flatten(config.to_dict()).items():
        console.print(f"  {path} = {value!r}", style="dim", markup=False)
    output.next("the same command without --dry_run")
    return {
        "num_train_examples": len(train),
        "num_heldout_examples": len(setup.data.heldout),
        "num_trainable_parameters": trainable,
        "num_parameters": trainable + frozen,
        "num_steps": len(setup.batches),
        "memory": memory,
        "data": setup.data.report.to_dict(),
        "config": config.to_dict(),
    }


def compiled_memory(setup: Any) -> dict[str, int]:
    """Compiles the training step and returns what XLA says of its memory, in bytes."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (setup.state, setup.frozen, setup.batches[0])
    )
    analysis = setup.train_step.lower(*shapes).compile().memory_analysis()
    argument, temporary = int(analysis.argument_size_in_bytes), int(analysis.temp_size_in_bytes)
    fresh = int(analysis.output_size_in_bytes) - int(analysis.alias_size_in_bytes)
    return {
        "argument_bytes": argument,
        "temporary_bytes": temporary,
        "total_bytes": argument + temporary + max(fresh, 0),
    }
