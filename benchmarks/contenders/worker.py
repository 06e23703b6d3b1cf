"""How a contender talks with the benchmark that started it: one JSON object a line.

A contender prints {"ready": …} once it can begin. For each line "pass" on its stdin it trains on all examples once and
prints {"seconds": …}; at the end of stdin it leaves. If it fails it prints {"error": …} first.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from gemma_tune.runtime.process_memory import dedicate_process, peak_memory_bytes

_ERROR_LETTERS = 500


def run(main: Callable[..., None]) -> None:
    """Calls main with the arguments of the command line."""
    dedicate_process()
    try:
        main(*sys.argv[1:])
    except Exception as error:
        tell(error=f"{type(error).__name__}: {str(error)[:_ERROR_LETTERS]}")
        raise


def serve(one_pass: Callable[[], None], peak_bytes: Callable[[], int] = peak_memory_bytes, **ready: Any) -> None:
    """Answers the benchmark until it closes stdin.

    Args:
        one_pass: Trains on all examples once, and returns when that is done.
        peak_bytes: Counts the memory that is reported.
        **ready: What to say before.
    """
    tell(ready=True, **ready)
    for line in sys.stdin:
        if line.strip() == "pass":
            start = time.perf_counter()
            one_pass()
            tell(seconds=time.perf_counter() - start, peak_bytes=peak_bytes())


def tell(**values: Any) -> None:
    """Prints a JSON object."""
    print(json.dumps(values), flush=True)


def tell_loaded(weight_bytes: int) -> None:
    """Says that the model is in memory, and what the process has held until then."""
    tell(loaded=True, peak_bytes=peak_memory_bytes(), weight_bytes=weight_bytes)
