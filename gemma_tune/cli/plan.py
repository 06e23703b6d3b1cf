"""`gemma-tune plan`: what a run would take on other devices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gemma_tune.cli.config_resolution import load_config_file
from gemma_tune.cli.flags import setting_flags
from gemma_tune.cli.output import make_listing
from gemma_tune.cli.verb import Flag, Invocation, Verb
from gemma_tune.config import Config
from gemma_tune.errors import ConfigError
from gemma_tune.mesh import parse_mesh
from gemma_tune.planning.hardware import HARDWARE, THIS_CPU, find_hardware
from gemma_tune.runtime.shell import gemma_tune_command

_TARGET_SHARE = 0.6
_MEMORY_ROWS = {
    "weights": "weights and a batch",
    "optimizer_state": "optimizer state",
    "activations": "activations saved for the backward pass",
    "gradients": "gradients",
    "workspace": "workspace of one decoder block",
}


def _run(invocation: Invocation) -> dict[str, Any]:
    """Prints the plan."""
    from gemma_tune.planning.plan import first_fitting_change, make_plans, mesh_shape

    flags, console = invocation.flags, invocation.output.console
    config = invocation.config().replace({"training.program": "whole"})
    training, model = config.training, config.model
    shape = mesh_shape(training.mesh, flags.num_devices, training.batch_size // training.grad_accum_steps)
    chips = [find_hardware(name.strip()) for name in flags.hardware.split(",")]
    if flags.calibrate:
        chips = [_calibrated(chips, flags.calibrate)]
    if flags.price is not None:
        chips = [chip._replace(dollars_per_hour=flags.price) for chip in chips]
    plans = make_plans(config, shape, flags.target_share, chips)
    console.print(
        f"{model.source}, {training.method}, {model.precision}: steps of {training.batch_size} × {config.row_length} "
        f"tokens on {shape}\n",
        markup=False,
    )
    console.print(_memory_table(plans[0]))
    console.print(_chip_table(plans, flags.num_tokens))
    for plan in plans:
        if plan.hardware.name == "t4" and "bfloat16" in model.precision:
            _warn("t4 has no bfloat16. Use --precision=float16.", console)
        if not plan.fits:
            change = first_fitting_change(config, shape, flags.target_share, plan.hardware)
            advice = f"It fits with {change}." if change else "Use larger chips or a smaller model."
            _warn(f"{plan.hardware.name} has too little memory. {advice}", console)
    command = gemma_tune_command("train", model=model.source, method=training.method, mesh=shape, dry_run=True)
    return {"plans": [_row(plan, flags.num_tokens) for plan in plans], "config": config.to_dict(), "next": [command]}


def _warn(text: str, console: Console) -> None:
    console.print(text, style="yellow", markup=False)


def _calibrated(chips: list[Any], workdir: str) -> Any:
    from gemma_tune.planning.calibrate import calibrated_by_run

    if len(chips) != 1:
        raise ConfigError("--calibrate needs one --hardware: the one that the run was on.")
    config: Config = load_config_file(workdir)
    shape = parse_mesh(config.training.mesh or "data:1")
    return calibrated_by_run(chips[0], Path(workdir).expanduser(), config, shape)


def _memory_table(plan: Any) -> Table:
    table = make_listing("Memory of each device, GB")
    table.add_column()
    table.add_column(justify="right")
    for name, text in _MEMORY_ROWS.items():
        table.add_row(text, f"{getattr(plan.memory, name) / 1e9:.2f}")
    table.add_row("total", f"{plan.memory.total / 1e9:.2f}", style="bold")
    return table


def _chip_table(plans: Sequence[Any], num_tokens: float) -> Table:
    shares = ", ".join(f"{plan.hardware.name} {plan.hardware.mfu:.0%}" for plan in plans)
    table = Table(
        box=box.SIMPLE_HEAD,
        caption=f"Cost of {num_tokens / 1e6:g}M tokens. Assumed utilization of the published peak rate: {shares}. "
        "--calibrate=WORKDIR takes that of a run.",
        caption_justify="left",
        pad_edge=False,
    )
    for title in ("chips", "memory", "max rows", "step", "tokens/s", "bound by", "cost"):
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


VERB = Verb(
    name="plan",
    usage="--model=gemma3_27b --hardware=v5e --mesh=fsdp:16 [--method=lora]",
    description="""Predicts what a run would take on devices that you don't have yet: memory of each device, seconds for
    a step, cost, and the largest batch size that fits. It computes with the model's shapes and the published rates of
    the hardware; nothing is loaded, and no device is needed. Prices are Google Cloud's on-demand prices in the US and
    change; --price sets yours.""",
    examples=(
        "gemma-tune plan --model=gemma3_27b --hardware=v5e,v5p --mesh=fsdp:16 --batch_size=16 --precision=bfloat16",
        "gemma-tune plan --model=gemma3_1b --hardware=t4 --precision=float16 --method=qlora",
        "gemma-tune plan --model=gemma3_4b --hardware=cpu --calibrate=runs/mine",
    ),
    flags=(
        *setting_flags("model", "precision", "quantize", "method", "lora_rank", "lora_targets", "batch_size",
                       "max_length"),
        Flag("hardware", f"One or more of {', '.join((*HARDWARE, THIS_CPU))} (this machine), with commas between.",
             "v5e", "Devices"),
        *setting_flags("mesh"),
        Flag("num_devices", "Number of devices for --mesh=auto.", 0, "Devices", lower=0, shows_default=False),
        Flag("price", "Dollars an hour for one chip.", None, "Devices", kind=float, lower=0),
        Flag("calibrate", "Workdir of a run on --hardware. Its speed is then assumed.", group="Devices"),
        Flag("num_tokens", "Number of tokens to compute the cost of.", 1e6, "Training", lower=1),
        Flag("target_share", "Share of all tokens that the model learns.", _TARGET_SHARE, "Training", lower=0.0,
             upper=1.0),
    ),
    run=_run,
)  # fmt: skip
