"""`gemma-tune train`."""

from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from gemma_tune.cli import flags
from gemma_tune.cli.output import Output
from gemma_tune.errors import ConfigError

USAGE = "--data=FILE [--model=…] [--workdir=…]"
DESCRIPTION = """Fine-tunes a model on your data and saves an adapter (or, with --method=full, a model) in the
workdir, with metrics, checkpoints, answers before and after, and a report. Killed or stopped, the same command goes
on where it was."""
EXAMPLES = (
    "gemma-tune train --data=questions.jsonl --workdir=runs/mine",
    "gemma-tune train --model=gemma3_1b --data='data/*.csv' --lora_targets=all-linear --precision=bfloat16",
    "gemma-tune train --config=configs/gemma3_270m.py --config.optimizer.warmup_steps=20",
    "gemma-tune train --data=questions.jsonl --dry_run",
)
_FLAGS = (
    "model", "data", "eval_data", "workdir", "method", "lora_rank", "lora_alpha", "lora_targets", "lora_layout",
    "use_rslora", "use_dora", "loraplus_lr_ratio", "adapter", "learning_rate", "num_epochs", "batch_size", "mesh",
    "max_length", "precision", "quantize", "qat", "block_size", "double_quant", "or_int8", "on_error", "seed",
)  # fmt: skip


def define_flags(values: absl_flags.FlagValues) -> None:
    """Defines the verb's flags."""
    flags.define(values, *_FLAGS)
    absl_flags.DEFINE_bool(
        "dry_run", False, "Show examples, parameters, steps and memory, and train nothing.", flag_values=values
    )
    absl_flags.DEFINE_string(
        "distributed",
        "",
        "One of several processes: auto asks the cluster (TPU pods, SLURM); else HOST:PORT,NUM_PROCESSES,INDEX.",
        flag_values=values,
    )
    absl_flags.DEFINE_string(
        "memory", "", "With --dry_run: what the run may take, like 16GB; else what the device has.", flag_values=values
    )


def run(
    values: absl_flags.FlagValues, overrides: Sequence[str], positional: Sequence[str], output: Output
) -> dict[str, Any]:
    """Trains, or shows what training would do."""
    del positional
    config = flags.to_config(values, overrides)
    if values.distributed:
        if not config.training.mesh:
            raise ConfigError("--distributed needs --mesh=auto, or a mesh of all devices of all processes.")
        from gemma_tune.runtime import processes

        processes.initialize_distributed(values.distributed)
        output.only_if(processes.is_primary())
    if values.dry_run:
        from gemma_tune.cli.dry_run import dry_run

        return dry_run(config, output, flags.memory_bytes(values.memory))
    from gemma_tune import pipeline
    from gemma_tune.cli.result import next_commands, show_result

    result = pipeline.run(config)
    show_result(result, output)
    commands = next_commands(result)
    output.next(*commands)
    return {**result.to_dict(), "next": commands}
