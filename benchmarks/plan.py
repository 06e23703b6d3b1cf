"""Whether `gemma-tune plan` is right: its memory against compiled steps, its time against steps that were run.

    python -m benchmarks.plan [--parts=memory,time] [--json]

`memory` compiles steps of models without weights for meshes of eight devices that a CPU counts as, and compares what
XLA counts on each with the prediction; in float32, since XLA on CPU computes in no other and makes copies. Must: within
10 %. `time` runs steps of the real Gemma 3 270M on this machine, calibrates with the first job, and compares the
others. Must: within 30 %.
"""

import json
import os
import statistics
import time
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

# XLA on CPU gathers the weights of all blocks at once, as early as it can, to keep its threads at work. Here it is told
# to order them for memory, as it does on GPUs and TPUs.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
    "--xla_cpu_enable_concurrency_optimized_scheduler=false"
)

import jax

from benchmarks.machine import describe
from gemma_tune.config import Config
from gemma_tune.mesh import MeshShape, parse_mesh
from gemma_tune.pipeline import read_splits, set_up
from gemma_tune.planning.abstract_train_state import abstract_train_state
from gemma_tune.planning.calibrate import calibrated
from gemma_tune.planning.duration import planned_step
from gemma_tune.planning.hardware import this_cpu
from gemma_tune.planning.step_memory import planned_memory

_PARTS = flags.DEFINE_list("parts", ["memory", "time"], "What to measure.")
_MODEL = flags.DEFINE_string("model", "demo", "The model whose steps are run.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", 4, "Steps to run; the first is not counted.", lower_bound=2)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")
_MOST_MEMORY, _MOST_TIME, _TARGET_SHARE = 0.10, 0.30, 0.6

# Model, mesh, rows, length, and what else differs from LoRA rank 16 on all linear layers.
MEMORY_JOBS: tuple[tuple[str, str, int, int, dict[str, Any]], ...] = (
    ("gemma3_270m", "data:1", 4, 512, {}),
    ("gemma3_270m", "data:1", 4, 512, {"training.remat": "full"}),
    ("gemma3_270m", "data:1", 2, 512, {"training.remat": "none"}),
    ("gemma3_270m", "fsdp:8", 8, 512, {"lora.target_layers": ["query", "value"]}),
    ("gemma3_270m", "fsdp:4,model:2", 8, 512, {}),
    ("gemma3_270m", "data:2,fsdp:2,model:2", 8, 256, {"training.method": "full"}),
    ("gemma3_270m", "fsdp:8", 32, 256, {"training.method": "full", "training.grad_accum_steps": 4}),
    ("gemma3_270m", "fsdp:8", 16, 512, {"training.method": "qlora", "model.quantize": "nf4"}),
    ("gemma3_1b", "fsdp:8", 8, 1024, {}),
    ("gemma3_1b", "model:4", 2, 512, {}),
    ("gemma2_2b_en", "fsdp:4,model:2", 8, 512, {}),
    ("gemma_2b_en", "fsdp:8", 16, 256, {"training.method": "full"}),
)
# Rows, length, and what else differs from LoRA rank 4 on query and value.
TIME_JOBS: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (1, 512, {}),
    (1, 1024, {}),
    (4, 128, {}),
    (1, 512, {"lora.target_layers": ["all-linear"], "lora.rank": 16}),
    (1, 512, {"training.remat": "full"}),
    (1, 512, {"training.method": "full"}),
    (1, 512, {"training.method": "qlora", "model.quantize": "int8"}),
)


def memory_row(model: str, mesh: str, rows: int, length: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Returns what was predicted and what was compiled, in bytes on each device."""
    settings = {
        "model.source": model,
        "training.batch_size": rows,
        "data.max_length": length,
        "training.program": "whole",
        "lora.rank": 16,
        "lora.target_layers": ["all-linear"],
        **changes,
    }
    shape = parse_mesh(mesh)
    devices = None
    if shape.num_devices > 1:
        types = (jax.sharding.AxisType.Auto,) * len(shape)
        devices = jax.make_mesh(tuple(shape), MeshShape._fields, types, devices=jax.devices()[: shape.num_devices])
    run = abstract_train_state(Config().replace(settings), shape, _TARGET_SHARE, devices)
    planned, compiled = planned_memory(run), run.compiled_memory()
    return {
        "job": f"{model}, {rows} × {length}, {_named(changes)}",
        "mesh": mesh,
        "arguments": compiled.argument_bytes,
        "predicted": planned.total,
        "measured": compiled.total_bytes,
        "error": planned.total / compiled.total_bytes - 1,
    }


def _named(changes: dict[str, Any]) -> str:
    values = (",".join(value) if isinstance(value, list) else str(value) for value in changes.values())
    names = (path.rsplit(".", 1)[-1].replace("_", " ") for path in changes)
    return "; ".join(f"{name} {value}" for name, value in zip(names, values, strict=True)) or "LoRA"


def time_rows(console: Console) -> list[dict[str, Any]]:
    """Returns what was predicted and what was run, in seconds a step; the first job calibrates."""
    found: list[dict[str, Any]] = []
    hardware = this_cpu()
    for rows, length, changes in TIME_JOBS:
        settings = {
            "model.source": _MODEL.value,
            "training.batch_size": rows,
            "data.max_length": length,
            "training.num_train_steps": _NUM_STEPS.value,
            **changes,
        }
        config = Config().replace(settings)
        with console.status(f"{rows} × {length}, {_named(changes)}…"):
            seconds, share = _step_seconds(config)
        if not found:
            hardware = calibrated(hardware, config, MeshShape(), share, seconds)
        predicted = planned_step(abstract_train_state(config, MeshShape(), share), hardware).seconds
        found.append(
            {
                "job": f"{rows} × {length}, {_named(changes)}",
                "target_share": share,
                "predicted": predicted,
                "measured": seconds,
                "error": predicted / seconds - 1,
                "mfu": hardware.mfu,
            }
        )
    return found


def _step_seconds(config: Config) -> tuple[float, float]:
    """Returns the median of a few steps, and the share of positions with a loss."""
    setup = set_up(config, read_splits(config))
    state, seconds, targets = setup.state, [], []
    setup.state = None  # type: ignore[assignment]  # Its buffers are given away.
    for step in range(_NUM_STEPS.value):
        start = time.perf_counter()
        state, metrics = setup.train_step(state, setup.frozen, setup.batches[step])
        targets.append(float(metrics.num_target_tokens))
        seconds.append(time.perf_counter() - start)
    positions = config.training.batch_size * config.row_length
    return statistics.median(seconds[1:]), statistics.mean(targets) / positions


def show(title: str, rows: list[dict[str, Any]], unit: float, most: float, console: Console) -> dict[str, Any]:
    """Prints a table; returns its rows with the verdict."""
    worst = max(abs(row["error"]) for row in rows)
    table = Table(title=f"{title}: off by {worst:.1%} at most; must be {most:.0%}: {_verdict(worst, most)}")
    for name in ("job", "mesh", "predicted", "measured", "error"):
        table.add_column(name, justify="right" if name in ("predicted", "measured", "error") else "left")
    for row in rows:
        figures = f"{row['predicted'] / unit:.3f}", f"{row['measured'] / unit:.3f}", f"{row['error']:+.1%}"
        table.add_row(row["job"], row.get("mesh", ""), *figures)
    console.print(table)
    return {"rows": rows, "worst": worst, "must": most, "is_reached": worst <= most}


def _verdict(worst: float, most: float) -> str:
    return "reached" if worst <= most else "missed"


def main(arguments: list[str]) -> None:
    """Measures what --parts says."""
    del arguments
    console = Console(stderr=_JSON.value, width=130)
    result: dict[str, Any] = describe()
    if "memory" in _PARTS.value:
        rows = []
        for job in MEMORY_JOBS:
            with console.status(f"Compiling {job[0]} for {job[1]}…"):
                rows.append(memory_row(*job))
            console.print(f"{rows[-1]['job']}: {rows[-1]['error']:+.1%}", style="dim")
        result["memory"] = show("Memory of each device, GB", rows, 1e9, _MOST_MEMORY, console)
    if "time" in _PARTS.value:
        result["time"] = show("A step, seconds", time_rows(console), 1.0, _MOST_TIME, console)
    if _JSON.value:
        print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
