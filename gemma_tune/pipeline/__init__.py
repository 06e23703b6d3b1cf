"""The pipeline's steps in order, from a Config to a tuned model.

The only place, besides the command line, that reads a Config.
"""

from gemma_tune.pipeline.comparison import compare
from gemma_tune.pipeline.post_training import Quantization, merge, quantize_model
from gemma_tune.pipeline.scoring import Comparison, compare_with_base, evaluate
from gemma_tune.pipeline.setup import Setup, prepare_data, read_splits, set_up
from gemma_tune.pipeline.training_run import RunResult, SampleAnswer, run, train

__all__ = [
    "Comparison",
    "Quantization",
    "RunResult",
    "SampleAnswer",
    "Setup",
    "compare",
    "compare_with_base",
    "evaluate",
    "merge",
    "prepare_data",
    "quantize_model",
    "read_splits",
    "run",
    "set_up",
    "train",
]
