"""`gemma-tune train --dry_run`: everything that can be known before the first step."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gemma_tune.cli.data import render_tokens
from gemma_tune.cli.forecast import Proposal, device_bytes, leaner, step_memory
from gemma_tune.cli.output import Output
from gemma_tune.config import Config
from gemma_tune.data import Splits
from gemma_tune.models.functional import parameters
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.pipeline import read_splits, set_up
from gemma_tune.settings import flatten

_NUM_EXAMPLES = 3


def dry_run(config: Config, output: Output, memory_limit: float = 0.0) -> dict[str, Any]:
    """Shows rendered examples, parameters, steps, and the compiled step's memory. Writes nothing and trains nothing.

    Args:
        config: The run.
        output: Where to.
        memory_limit: Bytes that the run may take; 0: what the device has. Beyond it, a leaner config is looked for.
    """
    console = output.console
    splits = read_splits(config)
    setup = set_up(config, splits)
    tokenizer = tokenizer_of(setup.model)
    console.print("Examples; what is learnt is green:\n")
    for example in setup.data.train[:_NUM_EXAMPLES]:
        console.print(render_tokens(example, tokenizer), soft_wrap=True)
        console.print()
    groups = parameters(setup.model)
    trainable, frozen = (sum(value.size for value in group.values()) for group in groups)
    memory = step_memory(setup)
    most_bytes = memory_limit or device_bytes()
    proposal = _propose(config, splits, most_bytes, console) if memory.total_bytes > most_bytes else None
    batches, train = setup.batches, setup.data.train
    num_tokens = int(train.counts.num_tokens.sum())
    num_positions = batches.steps_per_epoch * batches.batch_size * batches.row_length
    shape = f"{batches.batch_size} × {batches.row_length} tokens"
    step_memory_label = "memory of a step" + (" on each device" if setup.sharding else "")
    rows = {
        "training examples": f"{len(train):,} ({num_tokens:,} tokens)",
        "held-out examples": f"{len(setup.data.heldout):,}",
        "trained parameters": f"{trainable:,} of {trainable + frozen:,} ({trainable / (trainable + frozen):.2%})",
        "steps": f"{len(batches):,} of {shape} ({batches.steps_per_epoch} an epoch)",
        "filled positions": f"{num_tokens / num_positions:.0%}",
        "attention": str(setup.attention),
        **({"mesh": str(setup.sharding)} if setup.sharding else {}),
        step_memory_label: f"{memory.total_bytes / 1e9:.2f} GB: weights and state "
        f"{memory.argument_bytes / 1e9:.2f}, while computing {memory.temporary_bytes / 1e9:.2f}",
    }
    table = Table(box=box.SIMPLE, show_header=False)
    for label, text in rows.items():
        table.add_row(label, text)
    console.print(table)
    if setup.precision_advice:
        console.print(setup.precision_advice, style="yellow", markup=False)
    if memory.total_bytes > most_bytes:
        console.print(_advice(memory.total_bytes, proposal, most_bytes), style="yellow", markup=False)
    for path, value in flatten(config.to_dict()).items():
        console.print(f"  {path} = {value!r}", style="dim", markup=False)
    output.next("the same command without --dry_run")
    return {
        "num_train_examples": len(train),
        "num_heldout_examples": len(setup.data.heldout),
        "num_trainable_parameters": trainable,
        "num_parameters": trainable + frozen,
        "num_steps": len(setup.batches),
        "attention": setup.attention._asdict(),
        "precision_advice": setup.precision_advice,
        "memory": {**memory._asdict(), "limit_bytes": most_bytes},
        "proposal": {"changes": proposal.changes, "memory": proposal.memory._asdict()} if proposal else None,
        "data": setup.data.report.to_dict(),
        "config": config.to_dict(),
    }


def _propose(config: Config, splits: Splits, most_bytes: float, console: Console) -> Proposal | None:
    """Compiles leaner configs until one fits; returns it, or the leanest."""
    leanest = None
    for changes in leaner(config):
        with console.status(f"Compiling with {', '.join(f'{path}={value}' for path, value in changes.items())}…"):
            proposal = Proposal(changes, step_memory(set_up(config.replace(changes), splits)))
        if leanest is None or proposal.memory.total_bytes < leanest.memory.total_bytes:
            leanest = proposal
        if proposal.memory.total_bytes <= most_bytes:
            return proposal
    return leanest


def _advice(needed: float, proposal: Proposal | None, most_bytes: float) -> str:
    text = f"That is more than the {most_bytes / 1e9:.2f} GB there are."
    if proposal is None or proposal.memory.total_bytes >= needed:
        return f"{text} Take a shorter --max_length, a smaller model, or --precision=bfloat16."
    fits = proposal.memory.total_bytes <= most_bytes
    text += f" {proposal.memory.total_bytes / 1e9:.2f} GB {'fit' if fits else 'are the least'}, with {proposal.flags()}"
    return text if fits else f"{text}. Also take a shorter --max_length, a smaller model, or --precision=bfloat16."
