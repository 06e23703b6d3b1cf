"""Lets lm-eval (EleutherAI's evaluation harness) evaluate gemma_tune's models, by `GemmaTuneLM`.

    from gemma_tune.evaluation.lm_eval import GemmaTuneLM
    lm_eval.simple_evaluate(GemmaTuneLM(model), tasks=["arc_easy"])

Or on the command line, where all of lm-eval's own flags can be used:

    python -m gemma_tune.evaluation.lm_eval --model_args source=runs/mine,quantize=int8 --tasks arc_easy

Needs `pip install 'gemma-tune[lm_eval]'`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Returns GemmaTuneLM, for which lm-eval is imported only when it is asked for."""
    if name != "GemmaTuneLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gemma_tune.evaluation.lm_eval.registered_model import lm_eval_class

    return lm_eval_class()
