"""What holding weights in few bits saves and costs: memory, time, gradients, and held-out loss.

    python -m benchmarks.quantization [--parts=training,learning,rounding] [--model=demo] [--json]

training: QLoRA beside LoRA, in processes of their own that take turns: bytes of weights, the process's peak, seconds a
    step, on documents in rows of 1 × 512, LoRA rank 16 on all linear layers.
learning: the cosine between each factor's gradient and that of the float model, at factors that LoRA has learnt for a
    while; and the held-out loss after the same steps on the support desk's questions.
rounding: the base model after training's end: held-out loss of documents in each scheme of `gemma-tune quantize`,
    calibrated on other documents.

What must be reached stands beside each figure; a figure that is missed ends the benchmark with exit code 1.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.processes import Contender, take_turns
from benchmarks.verdicts import Verdict, verdict_table

_PARTS = flags.DEFINE_list("parts", ["training", "learning", "rounding"], "Which.")
_MODEL = flags.DEFINE_string("model", "demo", "The model.")
_SCHEMES = flags.DEFINE_list("schemes", ["int8", "int4", "nf4"], "Of training and learning.")
_BLOCK_SIZE = flags.DEFINE_integer("block_size", 64, "Weights of int4 and nf4 that share a scale.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "training: passes of each; the median counts.", lower_bound=1)
_NUM_DOCUMENTS = flags.DEFINE_integer("num_documents", 12, "training: documents in a pass.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 60, "learning: steps of each.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 32_768, "rounding: calibration data.", lower_bound=512)
_HELDOUT = flags.DEFINE_integer("heldout", 48, "rounding: documents held out.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")

_RANK = 16
_MOST_BYTES = {"int8": 0.28, "int4": 0.16, "nf4": 0.16}
_MOST_PEAK_BYTES = {"int4": 1.4e9}
_MOST_SECONDS = {"int8": 1.3, "int4": 1.6, "nf4": 1.6}
_LEAST_COSINE = {"int8": 0.999, "int4": 0.95, "nf4": 0.95}
_MOST_LOSS = {"int8": 1.005, "nf4": 1.02}
_LOSSES_MAY_DIFFER = 1.0  # Rounded weights give another loss; that all do the same is what `learning` looks at.


def training() -> dict[str, Any]:
    """Returns scheme -> bytes and seconds, that of float32 as `float32`."""
    settings = ("row_length=512", "targets=all-linear", f"rank={_RANK}")
    contenders = {}
    for scheme in ("float32", *_SCHEMES.value):
        of_scheme = () if scheme == "float32" else (f"quantize={scheme}", f"block_size={_BLOCK_SIZE.value}")
        contenders[scheme] = Contender("ours", "documents", _NUM_DOCUMENTS.value, _MODEL.value, *settings, *of_scheme)
    figures = {}
    for scheme, measured in take_turns(contenders, _REPEATS.value, _LOSSES_MAY_DIFFER).items():
        figures[scheme] = {
            "weight_bytes": measured.ready["loaded"]["weight_bytes"],
            "loading_peak_bytes": measured.ready["loaded"]["peak_bytes"],
            "peak_bytes": measured.peak_bytes,
            "seconds_per_step": statistics.median(measured.seconds) / measured.ready["num_steps"],
        }
    floats = figures["float32"]
    for row in figures.values():
        row["weights"] = row["weight_bytes"] / floats["weight_bytes"]
        row["time"] = row["seconds_per_step"] / floats["seconds_per_step"]
    return figures


def learning() -> dict[str, Any]:
    """Returns scheme -> least cosine of a factor's gradient, and held-out loss."""
    from benchmarks.learning import learn

    figures: dict[str, Any] = {}
    point, wanted = None, {}
    for scheme in ("float32", *_SCHEMES.value):
        learnt = learn(_MODEL.value, scheme, _BLOCK_SIZE.value, _STEPS.value, _RANK, point)
        point = learnt.point if point is None else point
        wanted = wanted or learnt.gradients
        cosines = {path: cosine(gradient, wanted[path]) for path, gradient in learnt.gradients.items()}
        figures[scheme] = {
            "heldout_before": learnt.before,
            "heldout_after": learnt.after,
            "least_cosine": min(cosines.values()),
            "mean_cosine": statistics.mean(cosines.values()),
            "worst_factor": min(cosines, key=lambda path: cosines[path]),
        }
        print(f"{scheme}: {figures[scheme]}", file=sys.stderr)
    for row in figures.values():
        row["loss"] = row["heldout_after"] / figures["float32"]["heldout_after"]
    return figures


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the cosine of the angle between two arrays as vectors."""
    flat = [np.asarray(each, np.float64).ravel() for each in (a, b)]
    return float(flat[0] @ flat[1] / (np.linalg.norm(flat[0]) * np.linalg.norm(flat[1])))


def rounding() -> dict[str, Any]:
    """Returns scheme -> held-out loss of documents."""
    from benchmarks.learning import rounded_losses

    return rounded_losses(_MODEL.value, _BLOCK_SIZE.value, _TOKENS.value, _HELDOUT.value)


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """Returns (what, figure, what it must be, whether it is)."""
    found = []

    def at_most(what: str, value: float, most: float) -> None:
        found.append((what, value, f"≤ {most:.4g}", value <= most))

    for scheme, row in result.get("training", {}).items():
        if scheme in _MOST_BYTES:
            at_most(f"{scheme}: weights in memory, of float32's", row["weights"], _MOST_BYTES[scheme])
            at_most(f"{scheme}: step time, of float32's", row["time"], _MOST_SECONDS[scheme])
        if scheme in _MOST_PEAK_BYTES:
            at_most(f"{scheme}: peak of the process, GB", row["peak_bytes"] / 1e9, _MOST_PEAK_BYTES[scheme] / 1e9)
            at_most(f"{scheme}: peak at loading, GB", row["loading_peak_bytes"] / 1e9, _MOST_PEAK_BYTES[scheme] / 1e9)
    for scheme, row in result.get("learning", {}).items():
        if scheme in _LEAST_COSINE:
            least = _LEAST_COSINE[scheme]
            what = f"{scheme}: least cosine of a factor's gradient"
            found.append((what, row["least_cosine"], f"≥ {least}", row["least_cosine"] >= least))
        if scheme in _MOST_LOSS:
            at_most(f"{scheme}: held-out loss, of LoRA's", row["loss"], _MOST_LOSS[scheme])
    losses = result.get("rounding", {})
    for scheme in ("gptq-int4", "awq-int4"):
        if scheme in losses:
            at_most(f"{scheme}: held-out loss, below int4's", losses[scheme], losses["int4"])
    return found


def show(result: dict[str, Any], console: Console) -> None:
    """Prints a table for each part, and the verdicts."""
    for part, columns in {
        "training": ("weights", "weight_bytes", "loading_peak_bytes", "peak_bytes", "seconds_per_step", "time"),
        "learning": ("heldout_before", "heldout_after", "loss", "least_cosine", "mean_cosine"),
    }.items():
        if part in result:
            table = Table("", *columns, title=part, title_justify="left")
            for scheme, row in result[part].items():
                table.add_row(scheme, *(f"{row[name]:.5g}" for name in columns))
            console.print(table)
    if "rounding" in result:
        table = Table("", "held-out loss", "above float32's", title="rounding", title_justify="left")
        for scheme, loss in result["rounding"].items():
            table.add_row(scheme, f"{loss:.4f}", f"{loss - result['rounding']['float32']:+.4f}")
        console.print(table)
    console.print(verdict_table(result["verdicts"]))


def main(arguments: Sequence[str]) -> None:
    """Measures the parts one after the other."""
    del arguments
    parts = {"training": training, "learning": learning, "rounding": rounding}
    result = {**describe(), **{name: parts[name]() for name in _PARTS.value}}
    result["verdicts"] = verdicts(result)
    show(result, Console(stderr=_JSON.value, width=120))
    if _JSON.value:
        print(json.dumps(result))
    if not all(is_reached for *_, is_reached in result["verdicts"]):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
