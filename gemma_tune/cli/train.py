"""`gemma-tune train`: fine-tunes a model."""

from typing import Any

from gemma_tune.cli.flags import memory_bytes, setting_flags
from gemma_tune.cli.verb import Flag, Invocation, Verb
from gemma_tune.errors import ConfigError


def _run(invocation: Invocation) -> dict[str, Any]:
    """Trains, or shows what training would do."""
    flags, output = invocation.flags, invocation.output
    config = invocation.config()
    if flags.distributed:
        if not config.training.mesh:
            raise ConfigError("--distributed needs --mesh=auto, or a mesh of all devices of all processes.")
        from gemma_tune.runtime import processes

        processes.initialize_distributed(flags.distributed)
        output.print_only_if(processes.is_primary())
    if flags.dry_run:
        from gemma_tune.cli.dry_run import dry_run

        findings = dry_run(config, output, memory_bytes(flags.memory))
        return {**findings, "next": [invocation.command_without("dry_run")]}
    from gemma_tune import pipeline
    from gemma_tune.cli.run_result import next_commands, show_run_result

    result = pipeline.run_training(config)
    show_run_result(result, output)
    return {**result.to_dict(), "next": next_commands(result)}


VERB = Verb(
    name="train",
    usage="--data=FILE [--model=…] [--workdir=…]",
    description="""Fine-tunes a model on your data. The workdir then holds the LoRA adapter (or, with --method=full, the
    model), metrics, checkpoints, sample answers and a report. If the run was stopped or killed, the same command
    resumes it.""",
    examples=(
        "gemma-tune train --data=questions.jsonl --workdir=runs/mine",
        "gemma-tune train --model=gemma3_1b --data='data/*.csv' --lora_targets=all-linear --precision=bfloat16",
        "gemma-tune train --config=configs/gemma3_270m.py --config.optimizer.warmup_steps=20",
        "gemma-tune train --data=questions.jsonl --dry_run",
    ),
    flags=(
        *setting_flags(
            "model", "data", "eval_data", "workdir", "method", "lora_rank", "lora_alpha", "lora_targets", "lora_layout",
            "use_rslora", "lora_dropout", "use_dora", "adapter", "learning_rate", "loraplus_lr_ratio", "num_epochs",
            "batch_size", "eval_metrics", "best_by", "mesh", "max_length", "precision", "quantize", "qat", "block_size",
            "double_quant", "or_int8", "on_error", "columns", "prompt_template", "on_role_order", "thoughts",
            "overlong", "dedup", "near_dedup_threshold", "report_to", "seed",
        ),
        Flag("dry_run", "Show examples, parameters, steps and memory, and train nothing.", False),
        Flag(
            "distributed",
            "Run as one of several processes: auto asks the cluster (TPU pods, SLURM); otherwise "
            "HOST:PORT,NUM_PROCESSES,INDEX.",
            group="Devices",
        ),
        Flag("memory", "With --dry_run: memory that the run may take, such as 16GB. Without it, what the device has."),
    ),
    run=_run,
)  # fmt: skip
