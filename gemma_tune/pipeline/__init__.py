"""The steps of the pipeline in order, from a Config to a tuned model.

Besides the command line, this is the only place that reads a Config.
"""

from gemma_tune.pipeline.comparison import compare
from gemma_tune.pipeline.evaluation import BASE, EvaluationOptions, evaluate_answers
from gemma_tune.pipeline.merge import merge_model
from gemma_tune.pipeline.ptq import QuantizationResult, quantize_model
from gemma_tune.pipeline.scoring import evaluate
from gemma_tune.pipeline.setup import Setup, mixture_counts, prepare_data, read_splits, set_up
from gemma_tune.pipeline.suite_evaluation import SuiteResult, run_suite
from gemma_tune.pipeline.training_result import RunResult, SampleAnswer
from gemma_tune.pipeline.training_run import run_training, train

__all__ = [
    "BASE",
    "EvaluationOptions",
    "QuantizationResult",
    "RunResult",
    "SampleAnswer",
    "Setup",
    "SuiteResult",
    "compare",
    "evaluate",
    "evaluate_answers",
    "merge_model",
    "mixture_counts",
    "prepare_data",
    "quantize_model",
    "read_splits",
    "run_suite",
    "run_training",
    "set_up",
    "train",
]
