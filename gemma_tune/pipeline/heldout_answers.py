"""Answers to held-out questions, before and after training."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from gemma_tune.data import Example
from gemma_tune.evaluation import choose_questions
from gemma_tune.pipeline.setup import Setup
from gemma_tune.pipeline.training_result import SampleAnswer
from gemma_tune.runtime import progress
from gemma_tune.runtime.atomic_files import write_json
from gemma_tune.runtime.processes import all_reduce_max, is_primary
from gemma_tune.serving.generation import generate

_SAMPLES_FILE = "samples.json"


def questions_to_answer(setup: Setup) -> list[Example]:
    """Returns the held-out conversations that are answered; the samples come first."""
    training = setup.config.training
    count = max(training.num_sample_answers, training.num_scored_answers)
    return choose_questions(setup.data.heldout_examples, count, setup.config.seed)


def answer_questions(setup: Setup, examples: Sequence[Example]) -> list[str]:
    """Returns the model's answers."""
    if not examples:
        return []
    return generate(  # type: ignore[return-value]  # A list of prompts gives a list.
        setup.model,
        [example.prompt for example in examples],
        **dataclasses.asdict(setup.config.generation),
        seed=setup.config.seed,
    )


def base_answers(setup: Setup, workdir: Path) -> list[SampleAnswer]:
    """Returns the sample questions with the untrained model's answers, or reads those that an interrupted run wrote."""
    samples = None
    with contextlib.suppress(OSError, ValueError, TypeError):  # Missing or damaged: they are written anew.
        samples = [SampleAnswer(**values) for values in json.loads((workdir / _SAMPLES_FILE).read_text("utf-8"))]
    if all_reduce_max(int(is_primary() and samples is not None)):
        return samples or []
    chosen = questions_to_answer(setup)[: setup.config.training.num_sample_answers]
    with progress.console.status(f"Answering {len(chosen)} held-out questions with the base model…"):
        answers = answer_questions(setup, chosen)
    samples = [
        SampleAnswer(example.question, example.answer, answer) for example, answer in zip(chosen, answers, strict=True)
    ]
    write_samples(workdir, samples)
    return samples


def write_samples(workdir: Path, samples: Sequence[SampleAnswer]) -> None:
    """Writes `samples.json`."""
    write_json(workdir / _SAMPLES_FILE, [dataclasses.asdict(sample) for sample in samples])
