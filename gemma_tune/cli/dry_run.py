"""`gemma-tune train --dry_run`: shows everything that can be known before the first step."""

from typing import Any, NamedTuple

from rich.console import Console

from gemma_tune.cli.data_tables import render_tokens
from gemma_tune.cli.forecast import Proposal, leaner, step_memory
from gemma_tune.cli.output import Output, make_listing
from gemma_tune.config import Config
from gemma_tune.data import Splits
from gemma_tune.models.functional import parameters
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.pipeline import Setup, read_splits, set_up
from gemma_tune.runtime.device_memory import available_device_bytes
from gemma_tune.settings import flatten
from gemma_tune.training.step.compile_once import StepMemory

_NUM_EXAMPLES = 3


class _NumParameters(NamedTuple):
    """Numbers of parameters: trained ones, and all of them."""

    trainable: int
    total: int


def dry_run(config: Config, output: Output, memory_limit: float = 0.0) -> dict[str, Any]:
    """Shows rendered examples, parameters, steps, and the compiled step's memory. Writes nothing and trains nothing.

    Args:
        config: Settings of the run.
        output: Where everything is printed.
        memory_limit: Bytes that the run may take; 0: the memory of the device. If the run needs more, settings that
            need less are looked for.

    Returns:
        Plain values for `--json`.
    """
    console = output.console
    splits = read_splits(config)
    setup = set_up(config, splits)
    tokenizer = tokenizer_of(setup.model)
    console.print("Examples. What the model learns is green:\n")
    for example in setup.data.train[:_NUM_EXAMPLES]:
        console.print(render_tokens(example, tokenizer), soft_wrap=True)
        console.print()
    trainable, frozen = (sum(value.size for value in group.values()) for group in parameters(setup.model))
    num_parameters = _NumParameters(trainable, trainable + frozen)
    memory = step_memory(setup)
    limit = memory_limit or available_device_bytes()
    proposal = _propose(config, splits, limit, console) if memory.total_bytes > limit else None
    _print_listing(setup, num_parameters, memory, console)
    if setup.precision_advice:
        console.print(setup.precision_advice, style="yellow", markup=False)
    if memory.total_bytes > limit:
        console.print(_advice(memory.total_bytes, proposal, limit), style="yellow", markup=False)
    console.print("Settings:", style="dim")
    for path, value in flatten(config.to_dict()).items():
        console.print(f"  {path} = {value!r}", style="dim", markup=False)
    return {
        "num_train_examples": len(setup.data.train),
        "num_heldout_examples": len(setup.data.heldout),
        "num_trainable_parameters": num_parameters.trainable,
        "num_parameters": num_parameters.total,
        "num_steps": len(setup.batches),
        "attention": setup.attention._asdict(),
        "precision_advice": setup.precision_advice,
        "memory": {**memory._asdict(), "limit_bytes": limit},
        "proposal": {"changes": proposal.changes, "memory": proposal.memory._asdict()} if proposal else None,
        "data": setup.data.report.to_dict(),
        "config": config.to_dict(),
    }


def _print_listing(setup: Setup, num_parameters: _NumParameters, memory: StepMemory, console: Console) -> None:
    batches, train = setup.batches, setup.data.train
    num_tokens = int(train.counts.num_tokens.sum())
    trainable, total = num_parameters
    rows = {
        "training examples": f"{len(train):,} ({num_tokens:,} tokens)",
        "held-out examples": f"{len(setup.data.heldout):,}",
        "trained parameters": f"{trainable:,} of {total:,} ({trainable / total:.2%})",
        "steps": f"{len(batches):,} of {batches.batch_size} × {batches.row_length} tokens, {batches.steps_per_epoch} "
        "in an epoch",
        "filled positions": f"{batches.filled_share:.0%}",
        "attention": str(setup.attention),
        **({"mesh": str(setup.sharding)} if setup.sharding else {}),
        "memory of a step" + (" on each device" if setup.sharding else ""): f"{_size(memory.total_bytes)}: "
        f"{_size(memory.argument_bytes)} for weights and state, {_size(memory.temporary_bytes)} to compute",
    }
    table = make_listing()
    for label, text in rows.items():
        table.add_row(label, text)
    console.print(table)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _propose(config: Config, splits: Splits, limit: float, console: Console) -> Proposal | None:
    """Compiles leaner configs until one fits; returns it, or the leanest."""
    leanest = None
    for changes in leaner(config):
        with console.status(f"Compiling with {', '.join(f'{path}={value}' for path, value in changes.items())}…"):
            proposal = Proposal(changes, step_memory(set_up(config.replace(changes), splits)))
        if leanest is None or proposal.memory.total_bytes < leanest.memory.total_bytes:
            leanest = proposal
        if proposal.memory.total_bytes <= limit:
            return proposal
    return leanest


def _advice(needed: float, proposal: Proposal | None, limit: float) -> str:
    text = f"This is more than the {_size(limit)} that there are."
    more = "a shorter --max_length, a smaller model, or --precision=bfloat16."
    if proposal is None or proposal.memory.total_bytes >= needed:
        return f"{text} Take {more}"
    size = _size(proposal.memory.total_bytes)
    if proposal.memory.total_bytes <= limit:
        return f"{text} {size} are enough with {proposal.flags()}"
    return f"{text} With {proposal.flags()} a step takes {size}, which is still too much. Also take {more}"
