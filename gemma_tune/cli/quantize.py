"""`gemma-tune quantize`."""

import collections
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags
from rich import box
from rich.table import Table

from gemma_tune.cli import flags
from gemma_tune.cli.output import Output
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.quantization.spec import PTQ_SCHEMES

USAGE = "--model=WORKDIR --scheme=SCHEME --output=FOLDER [--calibration=FILE]"
DESCRIPTION = """Holds a trained model's weights in few bits and saves it as a preset, which every verb takes as
--model. LoRA is merged first, in floats. int8, int4 and nf4 round weights to the nearest code, and need no data;
int8-dynamic rounds the inputs of each product too, token by token. gptq-int4 and awq-int4 choose codes by what they do
to each layer's outputs on the calibration data. smoothquant-int8 is int8-dynamic after a part of the inputs' range was
moved into the weights, by calibration data too."""
EXAMPLES = (
    "gemma-tune quantize --model=runs/mine --scheme=int8 --output=runs/mine-int8",
    "gemma-tune quantize --model=runs/mine --scheme=gptq-int4 --calibration=questions.jsonl --output=runs/mine-int4",
    "gemma-tune compare --reference=runs/mine --candidates=runs/mine-int8,runs/mine-int4 --data=other_questions.jsonl",
)


def define_flags(values: absl_flags.FlagValues) -> None:
    """Defines the verb's flags."""
    flags.define_some(values, "model")
    absl_flags.DEFINE_string("scheme", "int8", f"{', '.join(PTQ_SCHEMES)}. (default: int8)", flag_values=values)
    absl_flags.DEFINE_string("output", "", "Folder for the preset; must not exist.", flag_values=values)
    flags.define_some(values, "calibration")
    absl_flags.DEFINE_integer(
        "calibration_tokens",
        32_768,
        "Of it, so many flow through the model. (default: 32768)",
        1,
        flag_values=values,
    )
    absl_flags.DEFINE_string("adapter", "", "A LoRA adapter to put on --model.", flag_values=values)
    flags.define(values, "block_size", "double_quant", "or_int8", "max_length", "precision", "on_error", "seed")


def run(
    values: absl_flags.FlagValues, overrides: Sequence[str], positional: Sequence[str], output: Output
) -> dict[str, Any]:
    """Quantizes, and prints what it came to."""
    del positional
    if values.scheme not in PTQ_SCHEMES:
        raise ConfigError(
            f"--scheme must be one of {', '.join(PTQ_SCHEMES)}; got {values.scheme!r}."
            f"{did_you_mean(values.scheme, PTQ_SCHEMES)}"
        )
    folder = flags.needed(values, "output", "where the quantized model is to be written")
    config = flags.to_config(values, overrides)
    if PTQ_SCHEMES[values.scheme].method and not (values["calibration"].present or values.config):
        raise ConfigError(
            f"--scheme={values.scheme} needs --calibration=DATA, such as the file that the model was trained with."
        )
    from gemma_tune import pipeline

    done = pipeline.quantize_model(
        config,
        values.scheme,
        folder,
        adapter=values.adapter,
        calibration_tokens=values.calibration_tokens,
    )
    output.console.print(
        f"{done.output}: {done.bytes / 1e6:,.1f} MB of weights, {done.bytes / done.float_bytes:.2f}× float32's "
        f"{done.float_bytes / 1e6:,.1f} MB, in {done.seconds:.0f} s.",
        markup=False,
    )
    if done.num_int8:
        output.console.print(f"{done.num_int8} layers are in int8, because --block_size doesn't divide their inputs.")
    if done.errors:
        output.console.print(_errors(done))
    commands = (
        f"gemma-tune compare --reference={config.model.source} --candidates={done.output} --data=FILE",
        f"gemma-tune chat --model={done.output}",
    )
    output.next(*commands)
    return {**done.to_dict(), "next": list(commands)}


def _errors(done: Any) -> Table:
    """Kind of layer by kind of layer: the mean over the blocks."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"Error of outputs on {done.num_tokens:,} tokens",
        title_justify="left",
    )
    for title in ("layer", "nearest code", done.scheme):
        table.add_column(title, justify="left" if title == "layer" else "right")
    kinds: dict[str, list[Any]] = collections.defaultdict(list)
    for error in done.errors:
        kinds[error.path.rsplit("/", 1)[-1]].append(error)
    for kind, errors in kinds.items():
        rounding, calibrated = (
            sum(getattr(error, name) for error in errors) / len(errors) for name in ("error_of_rounding", "error")
        )
        table.add_row(kind, f"{rounding:.3%}", f"{calibrated:.3%}")
    return table
