"""`gemma-tune plan`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from rich import box
from rich.table import Table

from gemma_tune.cli import flags
from gemma_tune.cli.output import Output
from gemma_tune.config import Config
from gemma_tune.errors import ConfigError
from gemma_tune.mesh import parse_mesh

USAGE = "--model=gemma3_27b --hardware=v5e --mesh=fsdp:16 [--method=lora]"
DESCRIPTION = """Predicts what a run would take on devices that you don't have yet: memory on each, seconds for a step,
what it costs, and the biggest batch that fits. From the model's shapes and the hardware's published rates; nothing is
loaded, and no device is needed. Prices are on-demand ones of Google Cloud in the US and change: --price says yours."""
EXAMPLES = (
    "gemma-tune plan --model=gemma3_27b --hardware=v5e,v5p --mesh=fsdp:16 --batch_size=16 --precision=bfloat16",
    "gemma-tune plan --model=gemma3_1b --hardware=t4 --precision=float16 --method=qlora",
    "gemma-tune plan --model=gemma3_4b --hardware=cpu --calibrate=runs/mine",
)
_TARGET_SHARE = 0.6
_ROWS = {
    "weights": "weights and a batch",
    "optimizer_state": "optimizer state",
    "activations": "activations kept for the backward pass",
    "gradients": "gradients",
    "workspace": "one block at work",
}


def define_flags(values: absl_flags.FlagValues) -> None:
    """Defines the verb's flags."""
    from gemma_tune.planning.hardware import HARDWARE, THIS_CPU

    flags.define_some(values, "model")
    known = ", ".join((*HARDWARE, THIS_CPU))
    absl_flags.DEFINE_string(
        "hardware", "v5e", f"One or more of {known} (this machine). (default: v5e)", flag_values=values
    )
    flags.define_some(values, "mesh")
    absl_flags.DEFINE_integer("num_devices", 0, "With --mesh=auto: how many.", 0, flag_values=values)
    absl_flags.DEFINE_float("price", None, "Dollars an hour for one chip.", 0, flag_values=values)
    absl_flags.DEFINE_float("num_tokens", 1e6, "Positions to say the cost of. (default: 1e6)", 1, flag_values=values)
    absl_flags.DEFINE_float(
        "target_share",
        _TARGET_SHARE,
        f"Of all positions, those that are learnt. (default: {_TARGET_SHARE})",
        0.0,
        1.0,
        flag_values=values,
    )
    absl_flags.DEFINE_string(
        "calibrate", "", "Workdir of a run that was on --hardware: times are then as fast as that.", flag_values=values
    )
    flags.define(values, "method", "quantize", "lora_rank", "lora_targets", "batch_size", "max_length", "precision")


def run(
    values: absl_flags.FlagValues, overrides: Sequence[str], positional: Sequence[str], output: Output
) -> dict[str, Any]:
    """Prints the plan."""
    del positional
    from gemma_tune.planning.hardware import find_hardware
    from gemma_tune.planning.plan import first_fitting_change, make_plans, mesh_shape

    config = flags.to_config(values, [*overrides, "--config.training.program=whole"])
    training = config.training
    shape = mesh_shape(training.mesh, values.num_devices, training.batch_size // training.grad_accum_steps)
    chips = [find_hardware(name.strip()) for name in values.hardware.split(",")]
    if values.calibrate:
        chips = [_calibrated(chips, values.calibrate)]
    if values.price is not None:
        chips = [chip._replace(dollars_per_hour=values.price) for chip in chips]
    plans = make_plans(config, shape, values.target_share, chips)
    console = output.console
    length = f"{training.batch_size} × {config.row_length} tokens"
    console.print(f"{config.model.source}, {training.method}, {config.model.precision}: steps of {length} on {shape}\n")
    console.print(_memory_table(plans[0]))
    console.print(_chip_table(plans, values.num_tokens))
    for plan in plans:
        if plan.hardware.name == "t4" and "bfloat16" in config.model.precision:
            console.print("t4 has no bfloat16: take --precision=float16.", style="yellow", markup=False)
        if not plan.fits:
            flags_that_fit = first_fitting_change(config, shape, values.target_share, plan.hardware)
            advice = f"It fits with {flags_that_fit}." if flags_that_fit else "Take larger chips, or a smaller model."
            console.print(f"{plan.hardware.name}: too small. {advice}", style="yellow", markup=False)
    command = f"gemma-tune train --model={config.model.source} --method={training.method} --mesh={shape} --dry_run"
    output.next(command)
    return {"plans": [_row(plan, values.num_tokens) for plan in plans], "config": config.to_dict(), "next": [command]}


def _calibrated(chips: list[Any], workdir: str) -> Any:
    from gemma_tune.planning.calibrate import calibrated_by_run

    if len(chips) != 1:
        raise ConfigError("--calibrate needs one --hardware: that on which the run was.")
    config: Config = flags.load_config_file(workdir)
    shape = parse_mesh(config.training.mesh or "data:1")
    return calibrated_by_run(chips[0], Path(workdir), config, shape)


def _memory_table(plan: Any) -> Table:
    table = Table(box=box.SIMPLE, title="Memory of each device, GB", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, text in _ROWS.items():
        table.add_row(text, f"{getattr(plan.memory, name) / 1e9:.2f}")
    table.add_row("together", f"{plan.memory.total / 1e9:.2f}", style="bold")
    return table


def _chip_table(plans: Sequence[Any], num_tokens: float) -> Table:
    shares = ", ".join(f"{plan.hardware.name} {plan.hardware.mfu:.0%}" for plan in plans)
    table = Table(
        box=box.SIMPLE_HEAD,
        caption=f"Cost of {num_tokens / 1e6:g}M tokens. Share of the published arithmetic that is assumed: {shares}; "
        "a run's own: --calibrate=WORKDIR.",
        caption_justify="left",
        pad_edge=False,
    )
    for title in ("chips", "memory", "most rows", "step", "tokens/s", "bound by", "cost"):
        table.add_column(title, justify="left" if title in ("chips", "bound by") else "right", no_wrap=True)
    for plan in plans:
        room = plan.hardware.memory_bytes
        style = "green" if plan.fits else "red"
        table.add_row(
            f"{plan.shape.num_devices} × {plan.hardware.name}",
            f"[{style}]{plan.memory.total / room:.0%}[/{style}] of {room / 1e9:.0f}",
            f"{plan.max_batch_size:,}" if plan.max_batch_size else "none",
            f"{plan.step.seconds:.3g} s",
            f"{plan.tokens_per_second:,.0f}",
            plan.step.bound_by,
            f"${plan.dollars(num_tokens):,.3g}" if plan.dollars_per_hour else "",
        )
    return table


def _row(plan: Any, num_tokens: float) -> dict[str, Any]:
    return {
        "hardware": plan.hardware._asdict(),
        "mesh": str(plan.shape),
        "num_devices": plan.shape.num_devices,
        "memory": {**plan.memory._asdict(), "total": plan.memory.total},
        "fits": plan.fits,
        "max_batch_size": plan.max_batch_size,
        "step": {**plan.step._asdict(), "seconds": plan.step.seconds, "bound_by": plan.step.bound_by},
        "tokens_per_second": plan.tokens_per_second,
        "max_batch_tokens_per_second": plan.max_batch_step.num_tokens / plan.max_batch_step.seconds
        if plan.max_batch_step
        else None,
        "dollars_per_hour": plan.dollars_per_hour,
        "dollars": plan.dollars(num_tokens),
        "num_tokens": num_tokens,
    }
