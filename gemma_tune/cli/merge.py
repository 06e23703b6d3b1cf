"""`gemma-tune merge`."""

from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags
from rich import box
from rich.table import Table

from gemma_tune.cli import flags
from gemma_tune.cli.output import Output

_INTO = ("floats", "codes")
USAGE = "--model=WORKDIR --output=FOLDER [--into=floats]"
DESCRIPTION = """Merges LoRA into the weights under it and saves a preset. Into floats, nothing is lost: where the run
was QLoRA, the base is read again as it was before it was quantized. Into codes, the sum is rounded again, and what
that costs is shown layer by layer."""
EXAMPLES = (
    "gemma-tune merge --model=runs/mine --output=runs/mine-merged",
    "gemma-tune merge --model=demo --adapter=runs/mine/adapter --output=runs/mine-merged",
    "gemma-tune merge --model=runs/mine --into=codes --output=runs/mine-nf4",
)
_NUM_WORST = 5


def define_flags(values: absl_flags.FlagValues) -> None:
    """Defines the verb's flags."""
    flags.define_some(values, "model")
    absl_flags.DEFINE_string("output", "", "Folder for the preset; must not exist.", flag_values=values)
    absl_flags.DEFINE_string("adapter", "", "A LoRA adapter to put on --model.", flag_values=values)
    absl_flags.DEFINE_enum(
        "into", "floats", _INTO, "floats: exactly. codes: into quantized weights, rounded again.", flag_values=values
    )
    flags.define(values, "quantize", "block_size", "double_quant", "or_int8", "precision", "seed")


def run(
    values: absl_flags.FlagValues, overrides: Sequence[str], positional: Sequence[str], output: Output
) -> dict[str, Any]:
    """Merges, and prints the errors of rounding."""
    del positional
    config = flags.to_config(values, overrides)
    folder = flags.needed(values, "output", "where the merged model is to be written")
    from gemma_tune import pipeline

    path, errors = pipeline.merge(config, folder, adapter=values.adapter, into=values.into)
    if errors:
        worst = sorted(errors, key=lambda error: -error.of_update)[:_NUM_WORST]
        table = Table(
            box=box.SIMPLE_HEAD, title="What rounding the merged weights lost, worst layers", title_justify="left"
        )
        for title in ("layer", "of the weights", "of what was learnt"):
            table.add_column(title, justify="left" if title == "layer" else "right")
        for error in worst:
            table.add_row(error.path, f"{error.of_weights:.2%}", f"{error.of_update:.1%}")
        mean = sum(error.of_update for error in errors) / len(errors)
        table.add_row(f"mean of {len(errors)}", "", f"{mean:.1%}")
        output.console.print(table)
    output.console.print(f"{path}: merged into {values.into}.", markup=False)
    commands = (f"gemma-tune eval --model={path} --data=FILE", f"gemma-tune chat --model={path}")
    output.next(*commands)
    return {"output": str(path), "into": values.into, "errors": [e._asdict() for e in errors], "next": list(commands)}
