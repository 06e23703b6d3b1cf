"""`gemma-tune export`: writes a model for other programs."""

from typing import Any

from gemma_tune.cli.flags import ADAPTER, setting_flags
from gemma_tune.cli.verb import Flag, Invocation, Verb
from gemma_tune.export.options import DEFAULT_OPTIONS, ExportOptions

_FORMAT_FLAGS = {
    "scheme": "Number format. gguf: f32, f16 (default), bf16, q8_0, q4_k_m or q4_0. litert: float32 (default) or int8.",
    "cache_length": "litert: maximum number of tokens in a conversation. 0: 1024.",
    "dtype": "hf: number format of the weights: float32, bfloat16 or float16.",
    "max_shard_size": "hf: largest file of weights.",
    "language": "Languages of the data, for the model card: en, or en,de.",
    "datasets": "Names of the data sets on Hugging Face, for the model card.",
}


def _run(invocation: Invocation) -> dict[str, Any]:
    """Exports, and prints what was written."""
    flags, console, config = invocation.flags, invocation.output.console, invocation.config()
    name = invocation.required("format", "what to write, such as hf")
    folder = invocation.required("output", "where the export is to be written")
    from gemma_tune.export.model_export import export_model

    options: dict[str, Any] = {option: flags[option].value for option in _FORMAT_FLAGS}
    done = export_model(
        config.model.source,
        name,
        folder,
        adapter=flags.adapter,
        merge=flags.merge,
        overwrite=flags.overwrite,
        precision=config.model.precision,
        seed=config.seed,
        options=ExportOptions(**options),
    )
    console.print(
        f"{done.output}: {len(done.files)} files, {done.bytes / 1e6:,.1f} MB, in {done.seconds:.0f} s.", markup=False
    )
    for note in done.notes:
        console.print(note, markup=False, soft_wrap=True)  # It may hold a command.
    return {**done.to_dict(), "next": [done.next]}


VERB = Verb(
    name="export",
    usage="--model=WORKDIR --format=FORMAT --output=FOLDER [--adapter=FOLDER]",
    description="""Writes a model in a format that other programs read, with a model card (README.md) that says where it
    comes from. keras: a KerasHub preset. hf: safetensors, config and tokenizer, for transformers and vLLM. gguf: one
    file, for llama.cpp and Ollama. litert: TensorFlow Lite, for phones. peft: the LoRA factors alone, for PEFT and
    vLLM. The other formats have LoRA merged; with --merge=false, keras keeps it beside the base model. An export is
    written completely or not at all.""",
    examples=(
        "gemma-tune export --model=runs/mine --format=hf --dtype=bfloat16 --output=runs/mine-hf",
        "gemma-tune export --model=runs/mine --format=gguf --scheme=q4_k_m --output=runs/mine-gguf",
        "gemma-tune export --model=runs/mine --format=litert --scheme=int8 --output=runs/mine-litert",
        "gemma-tune export --model=runs/mine --format=peft --output=runs/mine-peft",
        "gemma-tune export --model=runs/mine --format=keras --output=runs/mine-keras",
        "gemma-tune export --model=demo --adapter=runs/mine/adapter --format=keras --merge=false --output=runs/keras",
    ),
    flags=(
        *setting_flags("model"),
        ADAPTER,
        *setting_flags("precision"),
        Flag("format", "keras, hf, peft, gguf or litert."),
        Flag("output", "Folder for the export. It must not exist, unless --overwrite is given."),
        Flag("overwrite", "Replace an earlier export, once the new one is complete.", False),
        Flag("merge", "Merge LoRA into the weights, or not. Without either, it is merged where possible.", None,
             kind=bool),
        *(Flag(name, text, getattr(DEFAULT_OPTIONS, name)) for name, text in _FORMAT_FLAGS.items()),
        *setting_flags("seed"),
    ),
    run=_run,
)  # fmt: skip
