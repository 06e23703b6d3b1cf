"""The fused loss against the plain one: bytes and time over tokens T and vocabulary V, and that gradients are equal.

    python -m benchmarks.loss_memory [--tokens=128,512,2048] [--vocabularies=32768,262144] [--json]

Both compute value and gradients, in the hidden states alone (a frozen head) or in the head too (a trained one). The
plain loss makes all T·V logits. Bytes are the compiled program's temporaries. Where the plain program needs more than
is free, it is compiled and not run.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe, free_bytes
from gemma_tune.training.losses.cross_entropy import fused_linear_cross_entropy

_TOKENS = flags.DEFINE_list("tokens", ["128", "512", "2048"], "T, positions with a loss.")
_VOCABULARIES = flags.DEFINE_list("vocabularies", ["32768", "262144"], "V, rows of the head.")
_WIDTH = flags.DEFINE_integer("width", 640, "Of the hidden states; Gemma 3 270M has 640.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Runs of each; the median counts.", lower_bound=1)
_FREE_BYTES = flags.DEFINE_integer("free_bytes", 0, "Memory that may be used; 0: most of what is free.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")


def plain_loss(hidden: jax.Array, head: jax.Array, target_ids: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the sum of the weighted cross-entropies, by way of all logits; arguments as of the fused loss."""
    log_probabilities = jax.nn.log_softmax((hidden @ head.T).astype(jnp.float32))
    return -jnp.sum(jnp.take_along_axis(log_probabilities, target_ids[:, None], axis=1)[:, 0] * weights)


def random_inputs(num_tokens: int, vocabulary: int) -> tuple[jax.Array, ...]:
    """Returns hidden states, head, targets and weights, of which some are 0, so that logits are of order 1."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (num_tokens, _WIDTH.value))
    head = jax.random.normal(keys[1], (vocabulary, _WIDTH.value)) / np.sqrt(_WIDTH.value)
    target_ids = jax.random.randint(keys[2], (num_tokens,), 0, vocabulary)
    return hidden, head, target_ids, (jnp.arange(num_tokens) % 7 > 0).astype(jnp.float32)


def compiled(loss: Callable, head_is_trained: bool, inputs: tuple[jax.Array, ...]) -> Any:
    """Returns the program of value and gradients."""
    return jax.jit(jax.value_and_grad(loss, (0, 1) if head_is_trained else 0)).lower(*inputs).compile()


def seconds_of(programs: dict[str, Any], inputs: tuple[jax.Array, ...]) -> dict[str, float]:
    """Returns the median seconds of programs that take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(_REPEATS.value):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def relative_difference(ours: Any, wanted: Any) -> float:
    """Returns the largest difference of any entry, relative to the largest entry of its array."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def measure(num_tokens: int, vocabulary: int, head_is_trained: bool) -> dict[str, Any]:
    """Compares both losses at one size."""
    inputs = random_inputs(num_tokens, vocabulary)

    def fused_loss(*inputs: jax.Array) -> jax.Array:
        return fused_linear_cross_entropy(*inputs, head_is_trained=head_is_trained).loss_sum

    losses = {"fused": fused_loss, "plain": plain_loss}
    programs = {name: compiled(loss, head_is_trained, inputs) for name, loss in losses.items()}
    memory = {name: program.memory_analysis() for name, program in programs.items()}
    needed = memory["plain"].temp_size_in_bytes + memory["plain"].output_size_in_bytes
    fits = needed <= (_FREE_BYTES.value or free_bytes())
    difference = None
    if fits:
        difference = relative_difference(*(program(*inputs) for program in programs.values()))
    else:
        jax.block_until_ready(programs["fused"](*inputs))
    seconds = seconds_of(programs if fits else {"fused": programs["fused"]}, inputs)
    return {
        "tokens": num_tokens,
        "vocabulary": vocabulary,
        "head": "trained" if head_is_trained else "frozen",
        "logits_bytes": 4 * num_tokens * vocabulary,
        **{f"{name}_bytes": memory[name].temp_size_in_bytes for name in losses},
        **{f"{name}_seconds": seconds.get(name) for name in losses},
        "difference": difference,
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints all sizes as a table."""
    table = Table(title=f"Loss and gradients, width {_WIDTH.value}: temporaries, and seconds", title_justify="left")
    titles = ("head", "T", "V", "logits MB", "fused MB", "plain MB", "fused s", "plain s", "difference")
    for title in titles:
        table.add_column(title, justify="left" if title == "head" else "right")
    for row in rows:
        sizes = [f"{row[key] / 1e6:.1f}" for key in ("logits_bytes", "fused_bytes", "plain_bytes")]
        plain = ["not run", ""]
        if row["difference"] is not None:
            plain = [f"{row['plain_seconds']:.3f}", f"{row['difference']:.1e}"]
        size = [row["head"], str(row["tokens"]), str(row["vocabulary"])]
        table.add_row(*size, *sizes, f"{row['fused_seconds']:.3f}", *plain)
    console.print(table)


def main(arguments: list[str]) -> None:
    """Measures all sizes."""
    del arguments
    rows = []
    for head_is_trained in (False, True):
        for vocabulary in map(int, _VOCABULARIES.value):
            for num_tokens in map(int, _TOKENS.value):
                rows.append(measure(num_tokens, vocabulary, head_is_trained))
                print(f"{rows[-1]['head']} head, T {num_tokens}, V {vocabulary}: done", file=sys.stderr)
    show(rows, Console(stderr=_JSON.value, width=110))
    if _JSON.value:
        print(json.dumps({**describe(), "width": _WIDTH.value, "rows": rows}))


if __name__ == "__main__":
    app.run(main)
