"""`gemma-tune merge`: merges LoRA into the weights."""

from typing import Any

from rich.table import Table

from gemma_tune.cli.flags import ADAPTER, setting_flags
from gemma_tune.cli.output import make_table
from gemma_tune.cli.verb import Flag, Invocation, Verb
from gemma_tune.models.sources.source import source_of_folder
from gemma_tune.runtime.shell import gemma_tune_command

_TARGETS = ("floats", "codes")
_NUM_WORST = 5


def _run(invocation: Invocation) -> dict[str, Any]:
    """Merges, and prints the rounding errors."""
    flags, console, config = invocation.flags, invocation.output.console, invocation.config()
    folder = invocation.required("output", "where the merged model is to be written")
    from gemma_tune import pipeline

    path, errors = pipeline.merge_model(config, folder, adapter=flags.adapter, into=flags.into)
    if errors:
        console.print(_errors_table(errors))
    console.print(f"{path}: LoRA is merged into {flags.into}.", markup=False)
    return {
        "output": str(path),
        "into": flags.into,
        "errors": [error._asdict() for error in errors],
        "next": [
            gemma_tune_command("eval", model=source_of_folder(path), data="FILE"),
            gemma_tune_command("chat", model=source_of_folder(path)),
        ],
    }


def _errors_table(errors: Any) -> Table:
    table = make_table(
        "Rounding error of the merged weights, largest first", "layer", "of the weights", "of the LoRA update"
    )
    for error in sorted(errors, key=lambda error: -error.of_update)[:_NUM_WORST]:
        table.add_row(error.path, f"{error.of_weights:.2%}", f"{error.of_update:.1%}")
    mean = sum(error.of_update for error in errors) / len(errors)
    table.add_row(f"mean of {len(errors)} layers", "", f"{mean:.1%}")
    return table


VERB = Verb(
    name="merge",
    usage="--model=WORKDIR --output=FOLDER [--into=floats]",
    description="""Merges LoRA into the weights of the base model and saves a preset. Merging into floats loses nothing:
    after QLoRA, the base model is read again as it was before quantization. Merging into codes rounds the sum again;
    the error is shown layer by layer.""",
    examples=(
        "gemma-tune merge --model=runs/mine --output=runs/mine-merged",
        "gemma-tune merge --model=demo --adapter=runs/mine/adapter --output=runs/mine-merged",
        "gemma-tune merge --model=runs/mine --into=codes --output=runs/mine-nf4",
    ),
    flags=(
        *setting_flags("model"),
        ADAPTER,
        *setting_flags("precision", "quantize", "block_size", "double_quant", "or_int8"),
        Flag("output", "Folder for the preset. It must not exist."),
        Flag("into", "floats: exact. codes: rounded again, into quantized weights.", "floats", choices=_TARGETS),
        *setting_flags("seed"),
    ),
    run=_run,
)
