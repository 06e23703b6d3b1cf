"""The flags that several verbs share, each of which sets one setting of Config."""

from collections.abc import Mapping
from typing import Any

from gemma_tune.cli.verb import Flag
from gemma_tune.config import Config
from gemma_tune.config_checks import METHODS, PRECISIONS, TRACKERS
from gemma_tune.errors import ConfigError
from gemma_tune.quantization.spec import SCHEMES
from gemma_tune.settings import flatten

# Group -> flag -> (setting, help). Types and defaults are those of the setting: Config is their only place.
_SETTING_FLAGS = {
    "Model": {
        "model": (
            "model.source",
            "A preset (see `gemma-tune models`), kaggle://…, hf://…, a directory, a .gguf file, demo, tiny, or the "
            "workdir of a run.",
        ),
        "precision": (
            "model.precision",
            f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}. mixed: float32 weights, 16-bit arithmetic. float16 is "
            "for GPUs without bfloat16.",
        ),
    },
    "Quantization": {
        "quantize": (
            "model.quantize",
            f"Quantize the weights to {', '.join(SCHEMES[:-1])} or {SCHEMES[-1]}. With QLoRA, nf4 unless given.",
        ),
        "block_size": ("model.block_size", "Number of int4 or nf4 weights that share a scale: 32, 64, 128 or 256."),
        "double_quant": ("model.double_quant", "Also quantize the scales of int4 and nf4, to eight bits."),
        "or_int8": ("model.or_int8", "Use int8 for layers whose input width is no multiple of --block_size."),
        "qat": (
            "training.qat",
            f"Quantization-aware training: compute with weights rounded to {', '.join(SCHEMES[:-1])} or "
            f"{SCHEMES[-1]}, so that quantizing the trained model changes nothing.",
        ),
    },
    "Data": {
        "data": (
            "data.source",
            "Files (.jsonl, .json, .csv, .tsv, .parquet or .arrow, also .gz) or folders; globs and lists with commas "
            "allowed. Or hf://datasets/ORG/NAME, tfds:NAME/CONFIG, sample:smartphone_support. A mixture: "
            "a.jsonl:0.7,b.parquet:0.3.",
        ),
        "eval_data": ("data.eval_source", "Held-out data. Without it, a part of --data is held out."),
        "calibration": ("data.source", "Data to calibrate with, best the training data; written as for --data."),
        "max_length": ("data.max_length", "Maximum length of an example, in tokens."),
        "overlong": (
            "data.overlong",
            "chunk: cut long documents into pieces, shorten long conversations. truncate: shorten both. drop: leave "
            "them out. error: stop.",
        ),
        "dedup": (
            "data.dedup",
            "Duplicates to drop. normalized: equal but for case, spaces and final punctuation. exact: equal in every "
            "character. none: keep all.",
        ),
        "near_dedup_threshold": (
            "data.near_dedup_threshold",
            "Also drop near duplicates from this similarity on, such as 0.8. 0: keep them.",
        ),
        "on_error": ("data.on_error", "raise: stop at the first unreadable row. skip: count and report such rows."),
        "columns": (
            "data.columns",
            "What columns with unusual names are, such as prompt:User Question,completion:Bot Answer.",
        ),
        "prompt_template": (
            "data.prompt_template",
            "Template of the question, with columns in braces, such as '{title}\\n{body}'.",
        ),
        "on_role_order": (
            "data.on_role_order",
            "merge: join turns of one speaker, and keep a leading model turn as context. error: refuse such rows.",
        ),
        "thoughts": (
            "data.thoughts",
            "Thoughts before an answer. keep: learn them. mask: read but don't learn them. drop: leave them out.",
        ),
    },
    "LoRA": {
        "lora_rank": ("lora.rank", "Rank of the LoRA factors."),
        "lora_alpha": ("lora.alpha", "LoRA updates are scaled by alpha / rank. 0: alpha = rank."),
        "lora_targets": (
            "lora.target_layers",
            "Layers that get LoRA factors: attention, all-linear, or layer names with commas between.",
        ),
        "lora_layout": (
            "lora.layout",
            "keras: factors for each attention head, as Keras's enable_lora has them. peft: factors of the flattened "
            "matrix, as PEFT has them.",
        ),
        "use_rslora": ("lora.use_rslora", "Scale LoRA updates by alpha / sqrt(rank) instead (rsLoRA)."),
        "lora_dropout": ("lora.dropout", "Rate of dropout on the input of LoRA's factors, in training."),
        "use_dora": ("lora.use_dora", "Also train the magnitude of each output's weights (DoRA)."),
        "adapter": (
            "model.adapter",
            "Continue training the LoRA factors of an earlier run or of PEFT, instead of new ones.",
        ),
    },
    "Optimizer": {
        "learning_rate": ("optimizer.learning_rate", "Peak learning rate. 0: 5e-4 for LoRA, 5e-5 for full."),
        "loraplus_lr_ratio": (
            "lora.loraplus_lr_ratio",
            "Ratio of the learning rates of LoRA's factors B and A (LoRA+). 16 is usual.",
        ),
    },
    "Training": {
        "method": ("training.method", f"{', '.join(METHODS[:-1])} or {METHODS[-1]} (LoRA on quantized weights)."),
        "num_epochs": ("training.num_epochs", "Number of passes over the data."),
        "batch_size": (
            "training.batch_size",
            "Number of rows of --max_length tokens in a step. Short examples share a row.",
        ),
        "eval_metrics": (
            "training.eval_metrics",
            "Metrics of answers to held-out questions at each evaluation, such as f1,rougeL.",
        ),
        "best_by": (
            "training.best_by",
            "Held-out metric that says which step is the best: loss, token_accuracy, or a metric of answers such as "
            "f1.",
        ),
    },
    "Devices": {
        "mesh": (
            "training.mesh",
            "Devices to spread the run over: auto, or for example data:2,fsdp:2,model:2 (copies of the model, parts of "
            "its weights, parts of its products).",
        ),
    },
    "Generation": {
        "max_new_tokens": ("generation.max_new_tokens", "Maximum length of an answer, in tokens."),
        "temperature": ("generation.temperature", "0: always the most likely token. Higher: more varied answers."),
        "top_k": ("generation.top_k", "Sample from the k most likely tokens. 0: from all."),
        "top_p": ("generation.top_p", "Sample from the smallest set of tokens that has this probability."),
        "min_p": (
            "generation.min_p",
            "Leave out tokens whose probability is less than this share of the most likely token's.",
        ),
        "repetition_penalty": (
            "generation.repetition_penalty",
            "Above 1: tokens that have occurred become less likely.",
        ),
    },
    "Output": {
        "workdir": ("workdir", "Folder of the run. The same command on the same folder resumes it."),
        "report_to": (
            "training.report_to",
            f"Trackers of metrics, with commas between: {', '.join(TRACKERS)}. metrics.jsonl is always written.",
        ),
    },
    "General": {
        "seed": ("seed", "Random seed."),
    },
}  # fmt: skip
_WITHOUT_DEFAULT = ("calibration",)  # It must be given where it is needed.

# Flags of single verbs that mean the same in each of them.
ADAPTER = Flag("adapter", "LoRA adapter to load on top of --model: a run, a folder or a file.", group="Model")


def setting_by_flag() -> dict[str, str]:
    """Returns the path of the setting that each flag sets, by the flag's name."""
    return {name: path for flags in _SETTING_FLAGS.values() for name, (path, _) in flags.items()}


def setting_flags(*names: str, defaults: Mapping[str, Any] | None = None) -> tuple[Flag, ...]:
    """Returns flags that set settings of Config.

    Args:
        names: Names of flags.
        defaults: Defaults by setting, of a verb that starts from other settings than Config's.
    """
    shown = flatten(Config().to_dict()) | dict(defaults or {})
    types = flatten(Config().to_dict())
    known = {name: (group, *flag) for group, flags in _SETTING_FLAGS.items() for name, flag in flags.items()}
    result = []
    for name in names:
        group, path, text = known[name]
        shows_default = name not in _WITHOUT_DEFAULT
        result.append(
            Flag(name, text, shown[path], group, setting=path, kind=type(types[path]), shows_default=shows_default)
        )
    return tuple(result)


def generation_flags() -> tuple[Flag, ...]:
    """Returns the flags of a verb in which a model answers."""
    names = (
        "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "precision",
        "quantize", "block_size", "mesh", "seed",
    )  # fmt: skip
    return (*setting_flags("model"), ADAPTER, *setting_flags(*names))


def memory_bytes(text: str) -> float:
    """Returns the bytes that the flag --memory names; 0 when it isn't given.

    Raises:
        ConfigError: It is no size.
    """
    from gemma_tune.runtime.byte_sizes import parse_bytes

    try:
        return parse_bytes(text) if text else 0.0
    except ValueError as error:
        raise ConfigError(f"--memory: {error}") from error
