"""Damaged files by the hundred thousand, read in one process: nothing may crash, hang, or take too much memory.

    python -m benchmarks.fuzz [--num_inputs=100000] [--readers=gguf,adapter,jsonl] [--seed=0] [--json]

Each input is a small whole file with random damage: bits, bytes and numbers changed, parts cut out, doubled or put
elsewhere. Half of the adapters get a right checksum again, so that what lies behind it is reached. A reader may only
return or raise an error of ours, within two seconds, and take at most so much memory as the file has bytes times 100,
and 4 MB. What fails is written to --keep, and `--replay=FILE --readers=NAME` reads it again.
"""

import json
import random
import signal
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.fuzz_readers import READERS, damaged, ending, too_long, try_one
from benchmarks.machine import describe
from gemma_tune.runtime.process_memory import peak_memory_bytes

_NUM_INPUTS = flags.DEFINE_integer("num_inputs", 100_000, "Over all readers.", lower_bound=1)
_READERS = flags.DEFINE_list("readers", ["gguf", "adapter", "jsonl"], "What reads.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the damage.")
_KEEP = flags.DEFINE_string("keep", "fuzz_failures", "Folder for inputs that fail.")
_REPLAY = flags.DEFINE_string("replay", "", "Read this file instead, and let its error out.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")


def fuzz(name: str, num_inputs: int, seed: int, keep: Path) -> dict[str, Any]:
    """Damages and reads so many files. Returns counts and seconds."""
    generator = random.Random(f"{seed} {name}")
    counts: Counter[str] = Counter(read=0, refused=0, failed=0)
    problems: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        reader = READERS[name](Path(folder))
        for whole in reader.wholes:  # Control: they can be read, and from here on memory is what a file takes.
            path = Path(folder) / f"whole{ending(reader, whole)}"
            path.write_bytes(whole)
            reader.read(path)
        memory, start = peak_memory_bytes(), time.perf_counter()
        tracemalloc.start()
        for index in track(range(num_inputs), description=name, console=Console(stderr=True)):
            whole = generator.choice(reader.wholes)
            content = reader.mend(damaged(whole, generator), generator)
            path = Path(folder) / f"damaged{ending(reader, whole)}"
            path.write_bytes(content)
            result, problem = try_one(reader, path, len(content))
            counts[result] += 1
            if problem:
                if not problems[problem.split(":")[0]]:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{name}-{index}{''.join(path.suffixes)}").write_bytes(content)
                    print(f"{name} {index}: {problem}", file=sys.stderr)
                problems[problem.split(":")[0]] += 1
        tracemalloc.stop()
    grown = peak_memory_bytes() - memory
    return {
        **counts,
        "problems": dict(problems),
        "seconds": time.perf_counter() - start,
        "grown_bytes": grown,
    }


def main(arguments: list[str]) -> None:
    """Runs all readers, one after the other."""
    del arguments
    signal.signal(signal.SIGALRM, too_long)
    if _REPLAY.value:
        with tempfile.TemporaryDirectory() as folder:
            READERS[_READERS.value[0]](Path(folder)).read(Path(_REPLAY.value))
        return
    share = -(-_NUM_INPUTS.value // len(_READERS.value))
    runs = {name: fuzz(name, share, _SEED.value, Path(_KEEP.value)) for name in _READERS.value}
    num_failed = sum(run["failed"] for run in runs.values())
    result = {
        **describe(),
        "seed": _SEED.value,
        "runs": runs,
        "num_inputs": share * len(runs),
        "num_failed": num_failed,
    }
    table = Table(title=f"{share * len(runs):,} inputs, {num_failed} failed", title_justify="left")
    for title in ("reader", "read", "refused", "failed", "seconds", "memory grown, MB"):
        table.add_column(title, justify="left" if title == "reader" else "right")
    for name, run in runs.items():
        figures = [f"{run[key]:,}" for key in ("read", "refused", "failed")]
        table.add_row(name, *figures, f"{run['seconds']:.0f}", f"{run['grown_bytes'] / 1e6:.0f}")
    Console(stderr=_JSON.value, width=110).print(table)
    if _JSON.value:
        print(json.dumps(result))
    if num_failed:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
