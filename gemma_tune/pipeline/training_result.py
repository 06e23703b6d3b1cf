"""The result of a training run, as `train` prints it and the report shows it."""

import dataclasses
from pathlib import Path
from typing import Any

from gemma_tune.data import DataReport
from gemma_tune.evaluation import AnswerScore
from gemma_tune.runtime.backend import keras


@dataclasses.dataclass
class SampleAnswer:
    """A held-out question with the model's answers before and after training.

    Attributes:
        question: The question.
        reference: The expected answer.
        base_answer: Answer before training.
        tuned_answer: Answer after training; '' until then.
    """

    question: str
    reference: str
    base_answer: str
    tuned_answer: str = ""


@dataclasses.dataclass
class RunResult:
    """The result of a training run.

    Attributes:
        model: The tuned CausalLM.
        workdir: Folder of the run.
        saved_to: Path of the adapter file, or the preset's folder of a fully tuned model.
        data: Report on cleaning, splitting and tokenizing.
        num_trainable: Number of trained parameters.
        num_steps: Number of steps.
        best_step: Step whose weights were saved.
        num_skipped_steps: Number of steps without an update: float16 couldn't hold their gradients, or they were bad.
        best_by: Held-out metric by which that step is the best.
        before: Held-out metrics before training; empty if nothing is held out.
        after: Held-out metrics of the best step; empty if nothing is held out.
        intervals: Value, low and high of the metrics of answers, `before` and `after` training.
        samples: Held-out questions with the answers before and after training.
        scores: Scores of the answers to held-out questions.
    """

    model: keras.Model
    workdir: Path
    saved_to: Path
    data: DataReport
    num_trainable: int
    num_steps: int
    best_step: int
    num_skipped_steps: int
    best_by: str
    before: dict[str, float]
    after: dict[str, float]
    intervals: dict[str, dict[str, dict[str, float]]]
    samples: list[SampleAnswer]
    scores: list[AnswerScore]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for `result.json` and `--json`."""
        return {
            "workdir": str(self.workdir),
            "saved_to": str(self.saved_to),
            "num_steps": self.num_steps,
            "best_step": self.best_step,
            "best_by": self.best_by,
            "num_skipped_steps": self.num_skipped_steps,
            "num_trainable_parameters": self.num_trainable,
            "heldout_before": self.before,
            "heldout_after": self.after,
            "heldout_intervals": self.intervals,
            "num_answers_scored": len(self.scores),
            "num_answers_right": sum(score.is_right for score in self.scores),
            "mean_answer_f1": sum(score.f1 for score in self.scores) / len(self.scores) if self.scores else None,
            "samples": [dataclasses.asdict(sample) for sample in self.samples],
            "data": self.data.to_dict(),
        }
