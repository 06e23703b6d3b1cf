"""gemma_tune's `train` with the quickstart's settings, and its `generate`.

python -m benchmarks.contenders.desk_ours SEED PRECISION
"""

import tempfile
import time

from benchmarks.contenders.desk import MAX_NEW_TOKENS, all_questions, config
from benchmarks.contenders.worker import run, tell
from gemma_tune.pipeline import run_training
from gemma_tune.serving.generation import generate


def main(seed: str, precision: str) -> None:
    """Trains once and answers all questions."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"training.num_sample_answers": 0, "training.num_scored_answers": 0}
        start = time.perf_counter()
        result = run_training(config(int(seed), precision, folder).replace(settings))
        seconds = time.perf_counter() - start
    prompts = [case.prompt for case in all_questions()]
    answers = generate(result.model, prompts, max_new_tokens=MAX_NEW_TOKENS)
    tell(answers=answers, seconds=seconds, num_steps=result.num_steps, heldout_loss=result.after["loss"])


if __name__ == "__main__":
    run(main)
