"""How much of what rounding to few bits loses comes back when training knows of it.

    python -m benchmarks.qat [--steps=60] [--scheme=int4] [--model=demo] [--json]

All weights of the model are trained on the shipped support desk, twice from the same start with the same batches: in
float, and with rounded weights (`training.qat`). Held-out loss is that of the float weights, of the same weights
converted, and of those that were trained rounded, converted. Must: of the loss that converting adds, quantization-aware
training takes back at least 60 %.
"""

import json
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from gemma_tune import Config, pipeline
from gemma_tune.models.functional import assign
from gemma_tune.models.load import load_model
from gemma_tune.models.quantized.convert import quantize_layers
from gemma_tune.pipeline.setup import read_splits, set_up
from gemma_tune.quantization.spec import BLOCK_SIZES, SCHEMES

_STEPS = flags.DEFINE_integer("steps", 60, "Of each training.", lower_bound=1)
_SCHEME = flags.DEFINE_enum("scheme", "int4", SCHEMES, "What to convert to.")
_BLOCK_SIZE = flags.DEFINE_enum("block_size", "64", [*map(str, BLOCK_SIZES)], "Weights that share a scale.")
_MODEL = flags.DEFINE_string("model", "demo", "The model to train.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 2, "Rows of a step.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 256, "Tokens of a row.", lower_bound=8)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")
_LEAST = 0.6


class Trained(NamedTuple):
    """Weights after training, on the host, and the median seconds of a step."""

    weights: dict[str, Any]
    step_seconds: float


def config_of(qat: str) -> Config:
    """Returns the run, without or with quantization-aware training."""
    return Config().replace(
        {
            "model.source": _MODEL.value,
            "model.block_size": int(_BLOCK_SIZE.value),
            "data.max_length": _MAX_LENGTH.value,
            "training.method": "full",
            "training.qat": qat,
            "training.batch_size": _BATCH_SIZE.value,
            "training.num_train_steps": _STEPS.value,
        }
    )


def trained(config: Config) -> Trained:
    """Trains, and evaluates nothing."""
    setup = set_up(config, read_splits(config))
    state, seconds = setup.state, []
    setup.state = None  # type: ignore[assignment]  # Its buffers are given away.
    for index in range(len(setup.batches)):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(setup.train_step(state, setup.frozen, setup.batches[index]))
        seconds.append(time.perf_counter() - start)
        print(f"qat={config.training.qat or 'none'} step {index + 1}: loss {metrics.loss:.4f}", file=sys.stderr)
    return Trained(jax.device_get(state.trainable), statistics.median(seconds))


def heldout_loss(config: Config, weights: dict[str, Any], is_converted: bool) -> float:
    """Returns the held-out loss of weights, as they are or converted."""
    model = load_model(config.model.source, seed=config.seed)
    assign(model, weights)
    quant_spec = config_of(_SCHEME.value).qat_spec
    if is_converted and quant_spec:
        quantize_layers(model.backbone, quant_spec)
    options = {"max_length": config.data.max_length, "batch_size": config.training.batch_size}
    return pipeline.evaluate(model, read_splits(config).heldout, **options)["loss"]


def measure() -> dict[str, Any]:
    """Trains both, one after the other."""
    plain, aware = config_of(""), config_of(_SCHEME.value)
    in_float = trained(plain)
    float_loss, rounded_loss = (heldout_loss(plain, in_float.weights, converted) for converted in (False, True))
    float_seconds = in_float.step_seconds
    del in_float
    rounded = trained(aware)
    aware_loss = heldout_loss(aware, rounded.weights, True)
    added, left = rounded_loss - float_loss, aware_loss - float_loss
    recovered = 1 - left / added if added > 0 else None
    return {
        "scheme": _SCHEME.value,
        "block_size": int(_BLOCK_SIZE.value),
        "num_steps": _STEPS.value,
        "float_loss": float_loss,
        "rounded_loss": rounded_loss,
        "qat_loss": aware_loss,
        "recovered": recovered,
        "must": _LEAST,
        "is_reached": recovered is not None and recovered >= _LEAST,
        "float_step_seconds": float_seconds,
        "qat_step_seconds": rounded.step_seconds,
    }


def main(arguments: list[str]) -> None:
    """Measures."""
    del arguments
    result = {**describe(), **measure()}
    verdict = "reached" if result["is_reached"] else "missed"
    recovered = "Rounding adds no loss" if result["recovered"] is None else f"{result['recovered']:.0%} recovered"
    table = Table(title=f"{recovered}; must be {_LEAST:.0%} at least: {verdict}", title_justify="left")
    for title in ("weights", "held-out loss", "added", "s a step"):
        table.add_column(title, justify="left" if title == "weights" else "right")
    for name, key, step in (
        ("float", "float_loss", "float"),
        (f"float, then {_SCHEME.value}", "rounded_loss", "float"),
        (f"{_SCHEME.value}, trained so", "qat_loss", "qat"),
    ):
        loss, seconds = result[key], result[f"{step}_step_seconds"]
        table.add_row(name, f"{loss:.4f}", f"{loss - result['float_loss']:+.4f}", f"{seconds:.2f}")
    Console(stderr=_JSON.value, width=110).print(table)
    if _JSON.value:
        print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
