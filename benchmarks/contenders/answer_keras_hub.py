"""KerasHub's own `generate`, on the model that ours serves.

python -m benchmarks.contenders.answer_keras_hub MODEL
"""

from collections.abc import Sequence

import numpy as np

from benchmarks.contenders.answering import serve
from benchmarks.contenders.worker import run, tell
from gemma_tune.models.load import load_model


def main(source: str) -> None:
    """Answers as the benchmark asks, one prompt after the other. Each length compiles a program, once."""
    model = load_model(source)
    tell(loaded=True)
    model.compile(sampler="greedy")
    generate = model.make_generate_function()

    def answer(prompts: Sequence[Sequence[int]], num_new: Sequence[int], together: bool) -> list[list[int]]:
        del together
        answers = []
        for prompt, count in zip(prompts, num_new, strict=True):
            length = len(prompt) + count
            token_ids = np.zeros((1, length), np.int32)
            token_ids[0, : len(prompt)] = prompt
            inputs = {"token_ids": token_ids, "padding_mask": np.arange(length)[None] < len(prompt)}
            made = generate(inputs, stop_token_ids=None)["token_ids"]
            answers.append(np.asarray(made)[0, len(prompt) :].tolist())
        return answers

    serve(answer)


if __name__ == "__main__":
    run(main)
