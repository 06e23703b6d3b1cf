"""How a contender that answers talks with `benchmarks.serving`: one JSON object a line.

It prints {"loaded": …} and {"ready": …} first. A line on its stdin is {"prompts": token ids of each, "num_new": tokens
of each answer, "together": whether all are asked at once}; it prints {"seconds": …, "answers": token ids of each}.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks.contenders.worker import tell
from gemma_tune.runtime.process_memory import peak_memory_bytes

Answer = Callable[[Sequence[Sequence[int]], Sequence[int], bool], list[list[int]]]


def serve(answer: Answer) -> None:
    """Answers the benchmark until it closes stdin."""
    tell(ready=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        answers = answer(asked["prompts"], asked["num_new"], asked["together"])
        tell(seconds=time.perf_counter() - start, answers=answers, peak_bytes=peak_memory_bytes())
