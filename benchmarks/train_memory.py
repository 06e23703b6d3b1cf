"""Peak memory of a training process, as the operating system counts it, by shape and method.

    python -m benchmarks.train_memory [--contenders=ours,tutorial,peft_torch] [--json]

Each figure is of a process of its own that loads the real Gemma 3 270M (float32), compiles and takes some steps on
documents: 1 × 512 and 4 × 512 tokens with LoRA rank 4 on query and value, and 1 × 512 with all weights trained by
AdamW.
"""

import json
import sys
import tempfile
from pathlib import Path

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.processes import Contender
from benchmarks.sources import demo_sources, installed

_CONTENDERS = flags.DEFINE_list("contenders", ["ours", "tutorial", "peft_torch"], "Whom to measure.")
_REMAT = flags.DEFINE_string("remat", "dots", "training.remat of ours.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")
# What is measured -> (batch size, trains all weights).
_RUNS = {"lora 1 × 512": (1, False), "lora 4 × 512": (4, False), "full 1 × 512": (1, True)}


def measure(who: str, source: str, batch_size: int, full: bool) -> dict[str, float]:
    """Runs one contender and returns its peak in bytes, after loading and after training."""
    settings = [f"batch_size={batch_size}", *(["targets=full"] if full else [])]
    if who == "ours":
        settings += [f"remat={_REMAT.value}", "row_length=512"]
    contender = Contender(who, "documents", 4 * batch_size, source, *settings)
    try:
        loaded = contender.start()["loaded"]
        return {"loading": loaded["peak_bytes"], "training": contender.ask("pass")["peak_bytes"]}
    finally:
        contender.stop()


def main(arguments: list[str]) -> None:
    """Measures all, one after the other."""
    del arguments
    console = Console(stderr=_JSON.value, width=110)
    chosen = installed(_CONTENDERS.value)
    result: dict = describe()
    table = Table(title="Peak memory of the process, GB", title_justify="left")
    for title in ("", *chosen):
        table.add_column(title, justify="left" if not title else "right")
    with tempfile.TemporaryDirectory() as folder:
        sources = demo_sources(Path(folder), chosen)
        for name, (batch_size, full) in _RUNS.items():
            result[name] = {}
            for who in chosen:
                result[name][who] = measure(who, sources[who], batch_size, full)
                print(f"{name} {who}: {result[name][who]['training'] / 1e9:.2f} GB", file=sys.stderr)
            table.add_row(name, *[f"{result[name][who]['training'] / 1e9:.2f}" for who in chosen])
    table.add_row("loading", *[f"{result['lora 1 × 512'][who]['loading'] / 1e9:.2f}" for who in chosen])
    console.print(table)
    if _JSON.value:
        print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
