"""`gemma-tune quantize`: quantizes a trained model."""

import collections
from typing import Any

from rich.table import Table

from gemma_tune.cli.flags import ADAPTER, setting_flags
from gemma_tune.cli.output import make_table
from gemma_tune.cli.verb import Flag, Invocation, Verb
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.models.sources.source import source_of_folder
from gemma_tune.quantization.spec import PTQ_SCHEMES
from gemma_tune.runtime.shell import gemma_tune_command


def _run(invocation: Invocation) -> dict[str, Any]:
    """Quantizes, and prints sizes and errors."""
    flags, console = invocation.flags, invocation.output.console
    if flags.scheme not in PTQ_SCHEMES:
        raise ConfigError(
            f"--scheme must be one of {', '.join(PTQ_SCHEMES)}; got {flags.scheme!r}."
            f"{did_you_mean(flags.scheme, PTQ_SCHEMES)}"
        )
    folder = invocation.required("output", "where the quantized model is to be written")
    config = invocation.config()
    if PTQ_SCHEMES[flags.scheme].method and not invocation.is_given("calibration"):
        raise ConfigError(
            f"--scheme={flags.scheme} needs --calibration=DATA, such as the file that the model was trained with."
        )
    from gemma_tune import pipeline

    done = pipeline.quantize_model(
        config,
        flags.scheme,
        folder,
        adapter=flags.adapter,
        calibration_tokens=flags.calibration_tokens,
    )
    console.print(
        f"{done.output}: {done.bytes / 1e6:,.1f} MB of weights, {done.bytes / done.float_bytes:.0%} of the "
        f"{done.float_bytes / 1e6:,.1f} MB in float32. It took {done.seconds:.0f} s.",
        markup=False,
    )
    if done.num_int8:
        console.print(f"{done.num_int8} layers are in int8: their input width is no multiple of --block_size.")
    if done.errors:
        console.print(_errors_table(done))
    return {
        **done.to_dict(),
        "next": [
            gemma_tune_command("compare", reference=config.model.source, candidates=done.output, data="FILE"),
            gemma_tune_command("chat", model=source_of_folder(done.output)),
        ],
    }


def _errors_table(done: Any) -> Table:
    """Returns the errors of each kind of layer, as the mean over the decoder blocks."""
    table = make_table(f"Output error on {done.num_tokens:,} tokens", "layer", "nearest code", done.scheme)
    kinds: dict[str, list[Any]] = collections.defaultdict(list)
    for error in done.errors:
        kinds[error.path.rsplit("/", 1)[-1]].append(error)
    for kind, errors in kinds.items():
        rounding, calibrated = (
            sum(getattr(error, name) for error in errors) / len(errors) for name in ("error_of_rounding", "error")
        )
        table.add_row(kind, f"{rounding:.3%}", f"{calibrated:.3%}")
    return table


VERB = Verb(
    name="quantize",
    usage="--model=WORKDIR --scheme=SCHEME --output=FOLDER [--calibration=FILE]",
    description="""Quantizes a trained model and saves it as a preset, which --model takes everywhere. LoRA is merged
    first, in floats. int8, int4 and nf4 round each weight to the nearest code and need no data. int8-dynamic also
    rounds the inputs of each product, token by token. gptq-int4 and awq-int4 choose the codes by their effect on each
    layer's outputs for the calibration data. smoothquant-int8 is int8-dynamic after a part of the inputs' range has
    been moved into the weights, which takes calibration data too.""",
    examples=(
        "gemma-tune quantize --model=runs/mine --scheme=int8 --output=runs/mine-int8",
        "gemma-tune quantize --model=runs/mine --scheme=gptq-int4 --calibration=questions.jsonl --output=runs/int4",
        "gemma-tune compare --reference=runs/mine --candidates=runs/mine-int8,runs/int4 --data=other_questions.jsonl",
    ),
    flags=(
        *setting_flags("model"),
        ADAPTER,
        Flag("scheme", f"{', '.join(PTQ_SCHEMES)}.", "int8", group="Quantization"),
        *setting_flags("precision", "block_size", "double_quant", "or_int8", "calibration"),
        Flag("calibration_tokens", "Number of tokens of it that go through the model.", 32_768, "Data", lower=1),
        *setting_flags("max_length", "on_error", "columns", "prompt_template"),
        Flag("output", "Folder for the preset. It must not exist."),
        *setting_flags("seed"),
    ),
    run=_run,
)
