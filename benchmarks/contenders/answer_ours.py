"""gemma_tune's serving engine.

python -m benchmarks.contenders.answer_ours MODEL [SCHEME]
"""

from collections.abc import Sequence

from benchmarks.contenders.answering import serve
from benchmarks.contenders.worker import run, tell
from gemma_tune.models.load import load_model
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.serving.engine.engine import Engine
from gemma_tune.serving.engine.request import AnswerDelta, Request


def main(source: str, scheme: str = "") -> None:
    """Answers as the benchmark asks."""
    model = load_model(source, quant_spec=QuantSpec(scheme) if scheme else None)
    tell(loaded=True)
    engine = Engine(model, max_concurrent=8, max_tokens_in_flight=4096, max_length=1024, max_queued=64)
    engine.start()

    def answer(prompts: Sequence[Sequence[int]], num_new: Sequence[int], together: bool) -> list[list[int]]:
        deltas: list[list[AnswerDelta]] = [[] for _ in prompts]
        handles = []
        for prompt, count, own in zip(prompts, num_new, deltas, strict=True):
            handles.append(engine.submit(Request(tuple(prompt), count), own.append))
            if not together:
                handles[-1].done.wait()
        for handle in handles:
            handle.done.wait()
        if engine.stats.compilations_since_start:
            raise SystemExit(f"The engine compiled after its start: {engine.stats}")
        return [[token for delta in own for token in delta.token_ids] for own in deltas]

    serve(answer)


if __name__ == "__main__":
    run(main)
