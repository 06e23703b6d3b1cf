"""How long much data takes to prepare, the first time and again, and how much memory.

    python benchmarks/data_at_size.py [--num_examples=1000000] [--model=tiny] [--json]

Writes a JSONL file of short questions and answers, all different, and prepares it twice with the same cache, each time
in a process of its own that knows neither Keras nor JAX: read, clean, find duplicates, split, tokenize, and plan an
epoch of packed rows.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 1_000_000, "Rows of the file.", lower_bound=100)
_MODEL = flags.DEFINE_string("model", "tiny", "Whose tokenizer and chat template.")
_MAX_LENGTH = flags.DEFINE_integer("max_length", 512, "Positions in a row.", lower_bound=8)
_FOLDER = flags.DEFINE_string("folder", None, "Where to put file and cache while it runs; a temporary one by default.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")
_FAMILY = flags.DEFINE_string("prepare_for", None, "Internal: prepare what is in --folder for this family.")
_SEED = 20240731
_ROWS, _TOKENIZER = "rows.jsonl", "tokenizer.spm"


def write_rows(path: Path, num_examples: int) -> None:
    """Writes rows of words from the shipped support desk: 5 to 15 in a question, 10 to 60 in an answer."""
    from gemma_tune.data import load_examples

    words = sorted(
        {word for e in load_examples("sample:smartphone_support") for word in (e.question + e.answer).split()}
    )
    rng = random.Random(_SEED)
    with open(path, "w", encoding="utf-8") as file:
        for index in range(num_examples):
            question = " ".join(rng.choices(words, k=rng.randrange(5, 16)))
            answer = " ".join(rng.choices(words, k=rng.randrange(10, 61)))
            file.write(json.dumps({"instruction": f"{question} {index}?", "response": answer}) + "\n")


def prepare(folder: Path, family: str, max_length: int) -> dict[str, Any]:
    """Prepares the file in a folder and plans an epoch; returns the figures."""
    from gemma_tune.data import EpochPlan, load_splits, template_for, tokenize_splits
    from gemma_tune.models.sources.tokenizer import TextTokenizer
    from gemma_tune.runtime.process_memory import peak_memory_bytes

    bytes_before = peak_memory_bytes()
    start = time.perf_counter()
    template = template_for(family)
    splits = load_splits(
        str(folder / _ROWS),
        template.control_tokens,
        eval_source="",
        split="train",
        eval_split="",
        eval_fraction=0.01,
        system_prompt="",
        on_error="raise",
        dedup="normalized",
        near_dedup_threshold=0.0,
        seed=0,
        cache=folder / "cache",
    )
    read = time.perf_counter()
    tokenizer = TextTokenizer((folder / _TOKENIZER).read_bytes())
    data = tokenize_splits(splits, template, tokenizer, max_length, "chunk", cache=folder / "cache")
    prepared = time.perf_counter()
    plan = EpochPlan(data.train.counts.num_tokens - 1, max_length, True, 0)
    rows = plan.rows(0)
    return {
        "seconds": prepared - start,
        "seconds_reading": read - start,
        "seconds_tokenizing": prepared - read,
        "plan_seconds": time.perf_counter() - prepared,
        "num_rows_packed": len(rows),
        "num_train": len(data.train),
        "num_heldout": len(data.heldout),
        "num_tokens": int(data.train.counts.num_tokens.sum()),
        "peak_bytes": peak_memory_bytes(),
        "peak_bytes_before": bytes_before,
    }


def in_a_process(folder: Path, family: str) -> dict[str, Any]:
    """Runs `prepare` in a process of its own, for its own peak memory."""
    command = [sys.executable, __file__, f"--folder={folder}", f"--prepare_for={family}"]
    done = subprocess.run(
        [*command, f"--max_length={_MAX_LENGTH.value}"], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path) -> dict[str, Any]:
    """Writes the file, and prepares it twice."""
    from gemma_tune.models.load import load_tokenizer

    tokenizer, family = load_tokenizer(_MODEL.value)
    (folder / _TOKENIZER).write_bytes(tokenizer.proto)
    write_rows(folder / _ROWS, _NUM_EXAMPLES.value)
    first, second = (in_a_process(folder, family) for _ in range(2))
    return {
        "num_examples": _NUM_EXAMPLES.value,
        "file_bytes": (folder / _ROWS).stat().st_size,
        "cache_bytes": sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file()),
        "num_cores": os.cpu_count(),
        "model": _MODEL.value,
        "examples_per_second": _NUM_EXAMPLES.value / first["seconds"],
        "first": first,
        "second": second,
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the figures as a table."""
    table = Table(
        title=f"{result['num_examples']:,} examples, {result['file_bytes'] / 1e6:.0f} MB of text, "
        f"{result['cache_bytes'] / 1e6:.0f} MB of cache, {result['num_cores']} cores"
    )
    for title in (
        "",
        "reading s",
        "tokenizing s",
        "together s",
        "examples/s",
        "planning s",
        "peak MB",
        "of it before MB",
    ):
        table.add_column(title, justify="left" if not title else "right")
    for name in ("first", "second"):
        row = result[name]
        seconds = [row[key] for key in ("seconds_reading", "seconds_tokenizing", "seconds")]
        rate = result["num_examples"] / row["seconds"]
        memory = [f"{row[key] / 1e6:.0f}" for key in ("peak_bytes", "peak_bytes_before")]
        table.add_row(name, *(f"{s:.2f}" for s in seconds), f"{rate:,.0f}", f"{row['plan_seconds']:.2f}", *memory)
    console.print(table)


def main(arguments: list[str]) -> None:
    """Measures, or, in the process of one measurement, prepares."""
    del arguments
    if _FAMILY.value:
        print(json.dumps(prepare(Path(_FOLDER.value), _FAMILY.value, _MAX_LENGTH.value)))
        return
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
        result = measure(Path(folder))
    show(result, Console(stderr=_JSON.value, width=110))
    if _JSON.value:
        print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
