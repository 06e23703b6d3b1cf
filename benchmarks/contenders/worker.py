"""How a contender talks with the benchmark that started it: one JSON object a line.

A contender prints {"ready": …} once it can begin. For each line "pass" on its stdin it trains on all examples once and
prints {"seconds": …}; at the end of stdin it leaves.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(one_pass: Callable[[], None], **ready: Any) -> None:
    """Answers the benchmark until it closes stdin."""
    tell(ready=True, **ready)
    for line in sys.stdin:
        if line.strip() == "pass":
            start = time.perf_counter()
            one_pass()
            tell(seconds=time.perf_counter() - start, peak_bytes=peak_bytes())


def tell(**values: Any) -> None:
    """Prints a JSON object."""
    print(json.dumps(values), flush=True)


def peak_bytes() -> int:
    """Returns the most memory that this process has held."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
