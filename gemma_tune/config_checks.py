"""Checks settings: the choices and ranges of each, and which of them exclude each other."""

from typing import Any

from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.mesh import AUTO_MESH, parse_mesh
from gemma_tune.quantization.spec import BLOCK_SIZES, SCHEMES

METHODS = ("full", "lora", "qlora")
PRECISIONS = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
OVERLONG = ("chunk", "truncate", "drop", "error")
DEDUP = ("normalized", "exact", "none")
ON_ERROR = ("raise", "skip")
ON_ROLE_ORDER = ("merge", "error")
THOUGHTS = ("keep", "mask", "drop")
LORA_LAYOUTS = ("keras", "peft")
ON_BAD_STEP = ("stop", "skip")
REMAT = ("none", "dots", "full")
PROGRAMS = ("auto", "whole", "per_block")
ATTENTION = ("auto", "xla", "cudnn", "splash", "keras")
# Held-out figures that need no answers, and whether higher ones are better.
HELDOUT_FIGURES = {"loss": False, "perplexity": False, "token_accuracy": True}
TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
REPORT_ARTIFACTS = ("report", "adapter")
MAX_TOP_K = 1024  # Sampling sorts no more tokens than these: sorting the vocabulary takes longer than the model.


def check_values(config: Any) -> None:
    """Checks every setting of a `config.Config`.

    Raises:
        ConfigError: A setting is wrong; says which, and which values are allowed.
    """
    _check_choices(config)
    _check_ranges(config)
    _check_combinations(config)


def check_serve_values(config: Any) -> None:
    """Checks every setting of a `serve_config.ServeConfig`. Raises what `check_values` does."""
    if not config.host:
        raise ConfigError("host must be an address such as 127.0.0.1, or 0.0.0.0 for all addresses; got none.")
    if not 0 <= config.port <= 65535:
        raise ConfigError(f"port must lie between 0 and 65535, got {config.port}.")
    for name in ("max_concurrent", "max_queued", "max_answers"):
        _at_least(name, getattr(config, name), 1)
    _at_least("max_length", config.max_length, 16)
    if config.max_tokens_in_flight < config.max_length:
        raise ConfigError(
            f"max_tokens_in_flight must be at least max_length={config.max_length}, so that the longest request fits; "
            f"got {config.max_tokens_in_flight}."
        )
    _at_least("max_body_bytes", config.max_body_bytes, 1024)
    _at_least("drain_seconds", config.drain_seconds, 0)
    if not config.request_timeout_seconds > 0:
        raise ConfigError(f"request_timeout_seconds must be above 0, got {config.request_timeout_seconds}.")


def _check_choices(config: Any) -> None:
    model, data, optimizer, training = config.model, config.data, config.optimizer, config.training
    _one_of("model.precision", model.precision, PRECISIONS)
    _one_of("model.quantize", model.quantize, ("", *SCHEMES))
    if model.block_size not in BLOCK_SIZES:
        raise ConfigError(
            f"model.block_size must be one of {', '.join(map(str, BLOCK_SIZES))}; got {model.block_size}."
        )
    _one_of("lora.layout", config.lora.layout, LORA_LAYOUTS)
    _one_of("data.overlong", data.overlong, OVERLONG)
    _one_of("data.on_error", data.on_error, ON_ERROR)
    _one_of("data.dedup", data.dedup, DEDUP)
    _one_of("data.on_role_order", data.on_role_order, ON_ROLE_ORDER)
    _one_of("data.thoughts", data.thoughts, THOUGHTS)
    _one_of("optimizer.name", optimizer.name, OPTIMIZERS)
    _one_of("optimizer.schedule", optimizer.schedule, SCHEDULES)
    _one_of("training.method", training.method, METHODS)
    _one_of("training.qat", training.qat, ("", *SCHEMES))
    _one_of("training.on_bad_step", training.on_bad_step, ON_BAD_STEP)
    _one_of("training.remat", training.remat, REMAT)
    _one_of("training.program", training.program, PROGRAMS)
    _one_of("training.attention", training.attention, ATTENTION)
    for name in training.report_to:
        _one_of("training.report_to", name, TRACKERS)
    for name in training.report_artifacts:
        _one_of("training.report_artifacts", name, REPORT_ARTIFACTS)


def _check_ranges(config: Any) -> None:
    data, lora, optimizer = config.data, config.lora, config.optimizer
    training, generation = config.training, config.generation
    _at_least("data.max_length", data.max_length, 8)
    _at_least("lora.rank", lora.rank, 1)
    _at_least("lora.alpha", lora.alpha, 0)
    if not 0 <= lora.dropout < 1:
        raise ConfigError(f"lora.dropout must be at least 0 and below 1, got {lora.dropout}.")
    if not lora.loraplus_lr_ratio > 0:
        raise ConfigError(f"lora.loraplus_lr_ratio must be above 0, got {lora.loraplus_lr_ratio}.")
    for name in ("learning_rate", "warmup_steps", "weight_decay", "clip_norm"):
        _at_least(f"optimizer.{name}", getattr(optimizer, name), 0)
    for name in ("num_epochs", "batch_size", "grad_accum_steps", "log_every_steps", "keep_last"):
        _at_least(f"training.{name}", getattr(training, name), 1)
    for name in ("num_train_steps", "eval_every_steps", "checkpoint_every_steps", "early_stopping_patience",
                 "num_sample_answers", "num_scored_answers", "num_eval_answers"):  # fmt: skip
        _at_least(f"training.{name}", getattr(training, name), 0)
    if training.loss_spike_factor and not training.loss_spike_factor > 1:
        raise ConfigError(f"training.loss_spike_factor must be 0 or above 1, got {training.loss_spike_factor}.")
    _at_least("generation.max_new_tokens", generation.max_new_tokens, 1)
    _at_least("generation.temperature", generation.temperature, 0)
    if not 0 <= generation.top_k <= MAX_TOP_K:
        raise ConfigError(f"generation.top_k must lie between 0 and {MAX_TOP_K}, got {generation.top_k}.")
    if not 0 <= generation.min_p <= 1:
        raise ConfigError(f"generation.min_p must lie between 0 and 1, got {generation.min_p}.")
    if not 0 < generation.repetition_penalty < float("inf"):
        raise ConfigError(f"generation.repetition_penalty must be above 0, got {generation.repetition_penalty}.")
    _check_data_ranges(data)
    if not 0 <= data.eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction must be at least 0 and below 1, got {data.eval_fraction}.")
    if not 0 < generation.top_p <= 1:
        raise ConfigError(f"generation.top_p must be above 0 and at most 1, got {generation.top_p}.")


def _check_data_ranges(data: Any) -> None:
    if not 0 <= data.near_dedup_threshold <= 1:
        raise ConfigError(f"data.near_dedup_threshold must lie between 0 and 1, got {data.near_dedup_threshold}.")
    if not 0 < data.mixture_temperature < float("inf"):
        raise ConfigError(f"data.mixture_temperature must be above 0, got {data.mixture_temperature}.")
    for name in ("mixture_max_repeats", "mixture_max_examples"):
        _at_least(f"data.{name}", getattr(data, name), 0)


def _check_combinations(config: Any) -> None:
    model, data, lora, training = config.model, config.data, config.lora, config.training
    if data.row_length and (data.row_length < data.max_length or not data.packing):
        raise ConfigError(
            f"data.row_length must be 0 or at least data.max_length={data.max_length}, with data.packing; got "
            f"{data.row_length}."
        )
    if not lora.target_layers:
        raise ConfigError("lora.target_layers must name at least one layer, got none.")
    if training.method == "full" and model.quantize:
        raise ConfigError(
            f"training.method=full can't train weights in {model.quantize}. Use training.method=qlora, or leave "
            "model.quantize empty."
        )
    if training.qat and config.quant_spec:
        raise ConfigError(
            f"training.qat={training.qat} trains float weights that are quantized later, but "
            f"{'model.quantize' if model.quantize else 'training.method=qlora'} quantizes them to "
            f"{config.quant_spec.scheme} from the start. Use training.method=lora or full without model.quantize, or "
            "leave training.qat empty."
        )
    if training.qat and model.double_quant:
        raise ConfigError(
            "training.qat can't be combined with model.double_quant, where the rounding of a row depends on many "
            "others. Leave one of them out."
        )
    if training.qat and config.lora.use_dora and training.method != "full":
        raise ConfigError(
            "training.qat rounds W + A·B and can't be combined with lora.use_dora, which takes its norms from weights "
            "that are not rounded. Leave one of them out."
        )
    if training.qat and lora.dropout and training.method != "full":
        raise ConfigError(
            "training.qat rounds W + A·B and can't be combined with lora.dropout, which changes the input of A alone. "
            "Leave one of them out."
        )
    if training.batch_size % training.grad_accum_steps:
        raise ConfigError(
            f"training.grad_accum_steps must divide training.batch_size, got {training.grad_accum_steps} and "
            f"{training.batch_size}."
        )
    if training.early_stopping_patience and not training.eval_every_steps:
        raise ConfigError("training.early_stopping_patience needs training.eval_every_steps above 0, got 0.")
    _check_eval_metrics(training)
    _check_mesh(training)


def _check_eval_metrics(training: Any) -> None:
    """Checks what can be checked without the metrics themselves; their names are checked when a run begins."""
    if not training.best_by:
        raise ConfigError("training.best_by must name a held-out metric, such as loss or f1; got none.")
    of_answers = [name for name in (*training.eval_metrics, training.best_by) if name not in HELDOUT_FIGURES]
    if of_answers and not training.num_eval_answers:
        raise ConfigError(f"The metric {of_answers[0]} needs answers: set training.num_eval_answers above 0, got 0.")


def _check_mesh(training: Any) -> None:
    if not training.mesh:
        return
    if training.program == "per_block":
        raise ConfigError(f"training.mesh={training.mesh} needs training.program=whole or auto, got per_block.")
    if training.mesh == AUTO_MESH:
        return
    shape, rows = parse_mesh(training.mesh), training.batch_size // training.grad_accum_steps
    if rows % shape.num_row_shards:
        per_micro_batch = " / training.grad_accum_steps" if training.grad_accum_steps > 1 else ""
        raise ConfigError(
            f"training.mesh={training.mesh} splits the rows of a batch into {shape.num_row_shards} parts, so "
            f"training.batch_size{per_micro_batch} must be a multiple of that; got {rows}."
        )


def _one_of(path: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        or_empty = "empty or " if "" in choices else ""
        named = [choice for choice in choices if choice]
        raise ConfigError(
            f"{path} must be {or_empty}one of {', '.join(named)}; got {value!r}.{did_you_mean(value, named)}"
        )


def _at_least(path: str, value: float, minimum: float) -> None:
    if not value >= minimum:  # Also catches NaN.
        raise ConfigError(f"{path} must be at least {minimum}, got {value}.")
