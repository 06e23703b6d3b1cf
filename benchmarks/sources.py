"""The models that are trained, as each contender reads them."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders.worker import tell_loaded
from benchmarks.jobs import Job, job
from benchmarks.shapes import parse_random, random_job
from gemma_tune.quantization.spec import QuantSpec

_NEEDS = {"peft_torch": ("peft", "transformers", "torch")}


def installed(contenders: Iterable[str]) -> list[str]:
    """Returns the contenders whose packages are there."""
    return [who for who in contenders if all(importlib.util.find_spec(name) for name in _NEEDS.get(who, ()))]


def demo_sources(folder: Path, contenders: Sequence[str]) -> dict[str, str]:
    """Returns contender -> where its model is; the tutorial's preset is written into the folder."""
    from gemma_tune.models.load import load_model
    from gemma_tune.models.sources.download import demo_path

    sources = {"ours": "demo", "peft_torch": str(demo_path())}
    if "tutorial" in contenders:
        load_model("demo").save_to_preset(str(folder / "preset"))
        sources["tutorial"] = str(folder / "preset")
    return {who: sources[who] for who in contenders}


def load_with_job(
    source: str, job_name: str, num_examples: int, quant_spec: QuantSpec | None = None
) -> tuple[Any, Job]:
    """Loads a KerasHub model, says so, and makes its job.

    Args:
        source: Any that gemma_tune loads, or random:SHAPE:PRECISION, whose job is of random tokens too.
        job_name: `documents` or `chats`.
        num_examples: In a pass.
        quant_spec: What its weights are held in; None: floats.
    """
    chosen = parse_random(source)
    if chosen:  # Imported only where needed: the other branch's readers of files aren't on every machine.
        from benchmarks.random_model import random_model

        model = random_model(*chosen)
        tell_loaded(sum(v.value.nbytes for v in model.backbone.variables))
        return model, random_job(num_examples, chosen[0].vocabulary)
    from gemma_tune.models.load import load_model
    from gemma_tune.models.sources.tokenizer import tokenizer_of

    model = load_model(source, quant_spec=quant_spec)
    tell_loaded(sum(v.value.nbytes for v in model.backbone.variables))
    return model, job(job_name, num_examples, tokenizer_of(model))
