"""transformers' `generate` on torch.

python -m benchmarks.contenders.answer_transformers GGUF_FILE
"""

from collections.abc import Sequence

import torch

from benchmarks.contenders.answering import serve
from benchmarks.contenders.peft_torch import load
from benchmarks.contenders.worker import run


def main(source: str) -> None:
    """Answers as the benchmark asks, one prompt after the other."""
    model, _ = load(source, "documents", 1)
    model.eval()

    def answer(prompts: Sequence[Sequence[int]], num_new: Sequence[int], together: bool) -> list[list[int]]:
        del together
        answers = []
        for prompt, count in zip(prompts, num_new, strict=True):
            ids = torch.tensor([list(prompt)])
            settings = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
            with torch.no_grad():
                made = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            answers.append(made[0, len(prompt) :].tolist())
        return answers

    serve(answer)


if __name__ == "__main__":
    run(main)
