"""Runs lm-eval's own command line, in which `gemma_tune` is a model, and the default one."""

import sys

from gemma_tune.errors import GemmaTuneError
from gemma_tune.evaluation.lm_eval.registered_model import lm_eval_class, with_default_model
from gemma_tune.runtime.process_memory import dedicate_process


def main() -> None:
    """Registers the model, and calls lm-eval."""
    dedicate_process()
    lm_eval_class()
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:] = with_default_model(sys.argv[1:])
    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except GemmaTuneError as error:
        sys.exit(f"error: {error}")
