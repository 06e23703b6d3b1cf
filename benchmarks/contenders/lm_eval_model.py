"""A model in lm-eval: ours, or a Hugging Face folder in lm-eval's own `hf`.

python -m benchmarks.contenders.lm_eval_model ours|hf SOURCE PRECISION TASKS_FOLDER TASK

It prints {"loaded": …} and {"ready": …} first. A line on its stdin is a batch size (of hf; ours chooses its own); it
prints {"seconds": of simple_evaluate, "log_probs": of each choice of each question, "accuracy": …}.
"""

import sys
import time
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from benchmarks.contenders.worker import run, tell
from gemma_tune.runtime.process_memory import peak_memory_bytes


def load(who: str, source: str, precision: str) -> Any:
    """Returns the model as lm-eval takes it."""
    if who == "ours":
        from gemma_tune.evaluation.lm_eval import GemmaTuneLM
        from gemma_tune.models.load import load_model

        return GemmaTuneLM(load_model(source, precision=precision))
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=source, dtype=precision, device="cpu", batch_size=1, add_bos_token=True)


def main(who: str, source: str, precision: str, folder: str, task: str) -> None:
    """Evaluates as often as the benchmark asks."""
    model = load(who, source, precision)
    tell(loaded=True, peak_bytes=peak_memory_bytes())
    manager = TaskManager(include_path=folder, include_defaults=False)
    tell(ready=True)
    for line in sys.stdin:
        if who == "hf":
            model.batch_size_per_gpu = int(line)
        start = time.perf_counter()
        results = lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0)
        seconds = time.perf_counter() - start
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        tell(
            seconds=seconds,
            log_probs=[[float(response[0][0]) for response in sample["resps"]] for sample in samples],
            accuracy=results["results"][task]["acc,none"],
            peak_bytes=peak_memory_bytes(),
        )


if __name__ == "__main__":
    run(main)
