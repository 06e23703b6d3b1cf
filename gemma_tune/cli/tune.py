"""`gemma-tune tune`: searches for better settings."""

import os
from typing import Any

from rich.console import Console

from gemma_tune.cli.flags import memory_bytes, setting_by_flag, setting_flags
from gemma_tune.cli.output import make_listing, make_table
from gemma_tune.cli.verb import Flag, Invocation, Verb
from gemma_tune.config import Config
from gemma_tune.runtime.shell import gemma_tune_command


def _run(invocation: Invocation) -> dict[str, Any]:
    """Searches, or shows what a search would cost."""
    from gemma_tune.tuning import start
    from gemma_tune.tuning.results.result_files import write_results
    from gemma_tune.tuning.workers import IS_WORKER, run_workers

    flags, output = invocation.flags, invocation.output
    config = invocation.config(Config().replace(_DEFAULTS))
    if flags.config and not flags["workdir"].present:
        config = config.replace({"workdir": f"{config.workdir}_search"})  # Beside the runs of that config.
    search = start.make_search(
        config,
        flags.space or None,
        budget=flags.budget,
        metric=flags.metric,
        storage=flags.storage,
        pruner=flags.pruner,
        side_by_side=flags.side_by_side,
        num_workers=flags.workers,
        memory_limit=memory_bytes(flags.memory),
        flags=setting_by_flag(),
    )
    if flags.dry_run:
        return {**_forecast(search, output.console), "next": [invocation.command_without("dry_run")]}
    if IS_WORKER in os.environ:
        start.start_search(search, show=start.silently)
        return {}
    if flags.workers > 1:
        study = run_workers(start.with_data(search), ["tune", *invocation.arguments])
    else:
        study = start.start_search(search)
    findings = write_results(search, study)
    _show(search, findings, output.console)
    if flags.retrain:
        from gemma_tune import pipeline
        from gemma_tune.cli.run_result import next_commands, show_run_result

        result = pipeline.run_training(start.retraining_config(search, study))
        show_run_result(result, output)
        return {**findings, "retrained": result.to_dict(), "next": next_commands(result)}
    return {**findings, "next": _next(search, findings)}


def _forecast(search: Any, console: Console) -> dict[str, Any]:
    """Shows the space, and what the search will cost by plan."""
    from gemma_tune.tuning.forecast import describe_space, forecast_search
    from gemma_tune.tuning.start import prepare

    search, runner = prepare(search, opens_study=False)
    forecast = forecast_search(search, runner)
    table = make_table("Space", "setting", "values", "first trial", "costs compilation", num_left=4)
    for path, values, first, is_compiled in describe_space(search):
        table.add_row(path, values, first, "yes" if is_compiled else "no")
    console.print(table)
    settings, listing = search.settings, make_listing("By plan")
    least, most = forecast.memory_bytes
    memory = f"{least / 1e9:.2f} to {most / 1e9:.2f} GB" if most else "unknown"
    minutes = "unknown"
    if forecast.seconds:
        minutes = f"at most {_duration(forecast.seconds)}"
        if settings.prunes:
            minutes += f"; about {_duration(forecast.pruned_seconds)} if pruning ends all that fall behind"
    rows = {
        "trials": f"{forecast.num_trials}"
        + (f", by {settings.num_workers} workers" if settings.num_workers > 1 else ""),
        "metric": ", ".join(f"{goal.name} ({goal.direction}d)" for goal in settings.goals),
        "steps of a whole trial": f"{forecast.num_steps:,}"
        + (f", evaluated every {search.eval_every_steps} for pruning" if search.eval_every_steps else ""),
        "time of a whole trial": _duration(forecast.seconds_per_trial) if forecast.seconds_per_trial else "unknown",
        "time of all": minutes,
        "programs to compile": f"{forecast.num_programs} at most",
        "memory of a trial": f"{memory}, of {forecast.memory_limit / 1e9:.2f} GB allowed",
        "trained side by side": str(forecast.num_side_by_side),
    }
    for label, text in rows.items():
        listing.add_row(label, text)
    console.print(listing)
    if most > forecast.memory_limit > 0:
        console.print("Trials that are too large will be left out.", style="yellow")
    return {"forecast": forecast._asdict(), "space": search.space.to_dict(), "config": search.base.to_dict()}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _show(search: Any, findings: dict[str, Any], console: Console) -> None:
    """Prints the best settings beside those of the first trial, and where everything was saved."""
    first = findings["trials"][0]
    is_front = len(findings["metrics"]) > 1
    names = [f"trial {best['trial']}" for best in findings["best"]]
    title = "Pareto front" if is_front else "Best settings"
    table = make_table(title, "", "first trial", *names, num_left=1)
    for metric in findings["metrics"]:
        table.add_row(metric, _text(first.get(metric)), *(_text(best["values"][metric]) for best in findings["best"]))
    for setting in search.space.settings:
        values = [best["params"].get(setting.path) for best in findings["best"]]
        table.add_row(setting.path, _text(first[setting.path]), *map(_text, values))
    console.print(table)
    for path, share in list(findings["importances"].items())[:3]:
        console.print(f"{path} explains {share:.0%} of the differences between trials.", markup=False)
    console.print(f"\nSaved in {search.workdir}:", markup=False)
    for name, what in (
        ("best.py", "the best settings, as a config file"),
        ("report.html", "history, and what each setting is worth, for a browser"),
        ("trials.csv", "all trials"),
        ("trials/", "the adapters of finished trials"),
    ):
        console.print(f"  {name:<30}{what}", markup=False)


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _next(search: Any, findings: dict[str, Any]) -> list[str]:
    """Returns the commands that train with the best settings, and that use the best trial's adapter."""
    best, config = findings["best"][0], search.base
    commands = [gemma_tune_command("train", config=search.workdir / "best.py")]
    if best["adapter"]:
        quantize = best["params"].get("model.quantize", config.model.quantize)
        flags = {"quantize": quantize} if quantize else {}
        commands.append(gemma_tune_command("chat", model=config.model.source, adapter=best["adapter"], **flags))
    return commands


_DEFAULTS = {"workdir": "runs/search"}

VERB = Verb(
    name="tune",
    usage="--data=FILE [--budget=20_trials|2h] [--metric=heldout_loss] [--space=space.yaml]",
    description="""Searches for better settings: trains trials with other learning rates, ranks, layers and schedules,
    ends those that fall behind, and says what each setting is worth. The first trial has the settings that you give.
    Trials that differ in numbers alone share one compiled program. If the search was stopped or killed, the same
    command goes on; started several times, on one machine or several, the processes share the work.""",
    examples=(
        "gemma-tune tune --data=questions.jsonl --workdir=runs/search --dry_run",
        "gemma-tune tune --data=questions.jsonl --workdir=runs/search --budget=30_trials",
        "gemma-tune tune --config=configs/gemma3_270m.py --space=space.yaml --budget=2h --metric=f1 --retrain",
        "gemma-tune tune --data=questions.jsonl --workdir=runs/search --metric=heldout_loss,model_size",
    ),
    flags=(
        *setting_flags(
            "model", "precision", "quantize", "block_size", "double_quant", "or_int8", "data", "eval_data",
            "max_length", "on_error", "columns", "prompt_template", "on_role_order", "thoughts", "overlong", "dedup",
            "near_dedup_threshold", "lora_rank", "lora_alpha", "lora_targets", "lora_layout", "use_rslora",
            "lora_dropout", "use_dora", "adapter", "learning_rate", "loraplus_lr_ratio", "method", "num_epochs",
            "batch_size", "qat", "mesh",
        ),
        Flag("space", "YAML file with the settings to search: lora.rank: [4, 8, 16], or optimizer.learning_rate: "
             "{low: 1e-5, high: 1e-2, log: true}. Without it, a space that suits the method.", group="Search"),
        Flag("budget", "Number of trials (30_trials) or time (2h, 90m). A trial that has begun is finished.",
             "20_trials", "Search"),
        Flag("metric", "What to improve: heldout_loss, perplexity, token_accuracy, seconds, memory, model_size, or a "
             "metric of answers such as f1. Several with commas between give a Pareto front.", "heldout_loss",
             "Search"),
        Flag("pruner", "What ends trials that fall behind: asha, hyperband or none.", "asha", "Search",
             choices=("asha", "hyperband", "none")),
        Flag("storage", "URL of a database that several machines share: sqlite:///…, postgresql://…. Without it, a "
             "journal file in the workdir.", group="Search"),
        Flag("workers", "Number of processes that share the budget on this machine.", 1, "Search", lower=1),
        Flag("side_by_side", "Number of trials that a process trains at once on one base model. 0: 1 on a CPU, else as "
             "many as fit, up to 8.", 0, "Search", lower=0),
        Flag("retrain", "At the end, train with the best settings on all data, held-out rows too.", False, "Search"),
        Flag("dry_run", "Show trials, minutes and memory by plan, and train nothing.", False),
        Flag("memory", "Memory that a trial may take, such as 16GB. Without it, what the device has.", group="Limits"),
        *setting_flags("workdir", "seed", defaults=_DEFAULTS),
    ),
    run=_run,
)  # fmt: skip
