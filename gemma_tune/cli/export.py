"""`gemma-tune export`."""

from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from gemma_tune.cli import flags
from gemma_tune.cli.output import Output
from gemma_tune.export.options import DEFAULT_OPTIONS, ExportOptions

USAGE = "--model=WORKDIR --format=FORMAT --output=FOLDER [--adapter=FOLDER]"
DESCRIPTION = """Writes a model in a format that other programs read, with a model card (README.md) that says where it
comes from. keras: a KerasHub preset. hf: safetensors, config and tokenizer, for transformers and vLLM. gguf: one file,
for llama.cpp and Ollama. litert: TensorFlow Lite, for phones. peft: LoRA factors alone, for
peft and vLLM. Elsewhere LoRA is merged; with --merge=false, keras
has it beside the base. The output appears whole or not at all."""
EXAMPLES = (
    "gemma-tune export --model=runs/mine --format=hf --dtype=bfloat16 --output=runs/mine-hf",
    "gemma-tune export --model=runs/mine --format=gguf --scheme=q4_k_m --output=runs/mine-gguf",
    "gemma-tune export --model=runs/mine --format=litert --scheme=int8 --output=runs/mine-litert",
    "gemma-tune export --model=runs/mine --format=peft --output=runs/mine-peft",
    "gemma-tune export --model=runs/mine --format=keras --output=runs/mine-keras",
    "gemma-tune export --model=demo --adapter=runs/mine/adapter --format=keras --merge=false --output=runs/mine-keras",
)


_FORMAT_FLAGS = {
    "scheme": "Of gguf: f32, f16 (default), bf16, q8_0, q4_k_m or q4_0. Of litert: float32 (default) or int8.",
    "cache_length": "Tokens that a conversation may have in litert. (default: 1024)",
    "dtype": "Of the weights in hf: float32, bfloat16 or float16.",
    "max_shard_size": "Largest file of weights in hf.",
    "language": "Of the data, for the model card: en, or en,de.",
    "datasets": "Names of the data on Hugging Face, for the model card.",
}


def define_flags(values: absl_flags.FlagValues) -> None:
    """Defines the verb's flags."""
    flags.define_some(values, "model")
    absl_flags.DEFINE_string("format", "", "keras, hf, peft, gguf or litert.", flag_values=values)
    absl_flags.DEFINE_string("output", "", "Folder for the export; must not exist.", flag_values=values)
    absl_flags.DEFINE_string("adapter", "", "A LoRA adapter to put on --model.", flag_values=values)
    absl_flags.DEFINE_bool("merge", None, "LoRA goes into the weights. (default: if it can)", flag_values=values)
    absl_flags.DEFINE_bool("overwrite", False, "Replaces an export, once the new one is whole.", flag_values=values)
    for name, text in _FORMAT_FLAGS.items():
        default = getattr(DEFAULT_OPTIONS, name)
        text = f"{text} (default: {default})" if default else text
        define = absl_flags.DEFINE_integer if isinstance(default, int) else absl_flags.DEFINE_string
        define(name, default, text, flag_values=values)
    flags.define(values, "precision", "seed")


def run(
    values: absl_flags.FlagValues, overrides: Sequence[str], positional: Sequence[str], output: Output
) -> dict[str, Any]:
    """Exports, and prints what is where."""
    del positional
    config = flags.to_config(values, overrides)
    name = flags.needed(values, "format", "what to write, such as hf")
    folder = flags.needed(values, "output", "where the export is to be written")
    from gemma_tune.export.model_export import export_model

    chosen: dict[str, Any] = {name: values[name].value for name in _FORMAT_FLAGS}
    done = export_model(
        config.model.source,
        name,
        folder,
        adapter=values.adapter,
        merge=values.merge,
        overwrite=values.overwrite,
        precision=config.model.precision,
        seed=config.seed,
        options=ExportOptions(**chosen),
    )
    output.console.print(
        f"{done.output}: {len(done.files)} files, {done.bytes / 1e6:,.1f} MB, in {done.seconds:.0f} s.", markup=False
    )
    for note in done.notes:
        output.console.print(note, markup=False)
    commands = [done.next]
    output.next(*commands)
    return {**done.to_dict(), "next": commands}
