"""Training throughput and peak memory of gemma_tune, the Keras tutorial's way, and transformers + peft.

    python -m benchmarks.train_throughput [--job=documents] [--repeats=3] [--json]

All three train LoRA rank 4 on query and value of the same real Gemma 3 270M (float32) on the same examples, and take
turns, pass by pass, in processes that stay alive. Before anything is timed, their losses must agree.
The default numbers of examples fill the packed rows to 97 % or more, as many would. `filled` is the share of a
contender's positions that are no padding.
Needs `pip install -e '.[demo,peers]'`; a contender that isn't installed is left out and named.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe, matmul_rate
from benchmarks.processes import Contender, take_turns
from benchmarks.shapes import SHAPES
from benchmarks.sources import demo_sources, installed

_JOBS = flags.DEFINE_list("job", ["documents", "chats"], "documents, chats, or both.")
_NUM_DOCUMENTS = flags.DEFINE_integer("num_documents", 24, "Documents in a pass.", lower_bound=1)
_NUM_CHATS = flags.DEFINE_integer("num_chats", 80, "Chats in a pass.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Passes of each contender; the median counts.", lower_bound=1)
_CONTENDERS = flags.DEFINE_list("contenders", ["ours", "tutorial", "peft_torch"], "Whom to measure.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")
_LOSS_TOLERANCE = 1e-3


def run_job(name: str, count: int, sources: dict[str, str], rate: float) -> dict[str, Any]:
    """Measures all contenders on one job; returns contender -> figures."""
    contenders = {who: Contender(who, name, count, source) for who, source in sources.items()}
    figures = {}
    for who, (ready, seconds, peak_bytes) in take_turns(contenders, _REPEATS.value, _LOSS_TOLERANCE).items():
        median = statistics.median(seconds)
        operations = SHAPES["gemma3_270m"].least_operations(ready["num_tokens"], ready["num_targets"])
        figures[who] = {
            **{key: ready[key] for key in ("loss", "num_steps", "num_tokens", "num_targets", "num_positions")},
            "num_examples": count,
            "seconds": seconds,
            "tokens_per_second": ready["num_tokens"] / median,
            "share_of_roofline": operations / median / rate,
            "peak_bytes": peak_bytes,
            "peak_bytes_loading": ready["loaded"]["peak_bytes"],
        }
    return figures


def show(name: str, figures: dict[str, Any], console: Console) -> None:
    """Prints a job's figures as a table."""
    some = next(iter(figures.values()))
    table = Table(
        title=f"{some['num_examples']} {name}, {some['num_tokens'] / some['num_examples']:.0f} tokens on average: "
        f"{some['num_tokens']} tokens, {some['num_targets']} with a loss"
    )
    for title in ("", "loss", "steps", "filled", "tokens/s", "ours is", "of roofline", "peak GB", "loading GB"):
        table.add_column(title, justify="left" if not title else "right")
    ours = figures.get("ours", some)["tokens_per_second"]
    for who, row in figures.items():
        table.add_row(
            who,
            f"{row['loss']:.4f}",
            str(row["num_steps"]),
            f"{row['num_tokens'] / row['num_positions']:.0%}",
            f"{row['tokens_per_second']:.1f}",
            f"{ours / row['tokens_per_second']:.2f}×",
            f"{row['share_of_roofline']:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['peak_bytes_loading'] / 1e9:.2f}",
        )
    console.print(table)


def main(arguments: list[str]) -> None:
    """Runs the jobs."""
    del arguments
    console = Console(stderr=_JSON.value, width=110)
    with tempfile.TemporaryDirectory() as folder:
        chosen = demo_sources(Path(folder), installed(_CONTENDERS.value))
        missing = [who for who in _CONTENDERS.value if who not in chosen]
        rate = matmul_rate()
        counts = {"documents": _NUM_DOCUMENTS.value, "chats": _NUM_CHATS.value}
        result = {**describe(), "matmul_flops_per_second": rate, "left_out": missing}
        console.print(f"{result['machine']}; matrix products: {rate / 1e9:.0f} GFLOP/s; left out: {missing or 'none'}")
        for name in _JOBS.value:
            result[name] = run_job(name, counts[name], chosen, rate)
            show(name, result[name], console)
    if _JSON.value:
        print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
