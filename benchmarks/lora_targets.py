"""What LoRA on all linear layers costs against LoRA on query and value.

    python -m benchmarks.lora_targets [--repeats=3] [--model=demo] [--json]

Both train the same model at rank 4 on the same documents, and take turns, pass by pass, in processes that stay alive.
Must: all linear layers take at most 1.25 times as long.
"""

import json
import statistics
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.processes import Contender, take_turns

_NUM_DOCUMENTS = flags.DEFINE_integer("num_documents", 24, "Documents in a pass.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Passes of each; the median counts.", lower_bound=1)
_MODEL = flags.DEFINE_string("model", "demo", "The model to train.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")
_TARGETS = ("query,value", "all-linear")
_MOST = 1.25
_SAME_LOSS = 1e-5  # Nothing is trained yet, and B is zero.


def measure() -> dict[str, Any]:
    """Returns targets -> figures, and the ratio of the medians."""
    contenders = {
        targets: Contender("ours", "documents", _NUM_DOCUMENTS.value, _MODEL.value, f"targets={targets}")
        for targets in _TARGETS
    }
    figures: dict[str, Any] = {}
    for targets, (ready, seconds, peak_bytes) in take_turns(contenders, _REPEATS.value, _SAME_LOSS).items():
        figures[targets] = {
            "seconds": seconds,
            "seconds_per_step": statistics.median(seconds) / ready["num_steps"],
            "tokens_per_second": ready["num_tokens"] / statistics.median(seconds),
            "peak_bytes": peak_bytes,
        }
    few, many = (figures[targets]["seconds_per_step"] for targets in _TARGETS)
    return {**figures, "ratio": many / few, "must": _MOST, "is_reached": many / few <= _MOST}


def main(arguments: list[str]) -> None:
    """Measures both."""
    del arguments
    result = {**describe(), **measure()}
    verdict = "reached" if result["is_reached"] else "missed"
    table = Table(title=f"{result['ratio']:.2f}× as long; must be {_MOST}× at most: {verdict}", title_justify="left")
    for title in ("LoRA on", "s a step", "tokens/s", "peak GB"):
        table.add_column(title, justify="left" if title == "LoRA on" else "right")
    for targets in _TARGETS:
        row = result[targets]
        figures = f"{row['seconds_per_step']:.3f}", f"{row['tokens_per_second']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}"
        table.add_row(targets, *figures)
    Console(stderr=_JSON.value, width=110).print(table)
    if _JSON.value:
        print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
