"""Searches hyperparameters with Optuna."""

from gemma_tune.tuning.search import tune

__all__ = ["tune"]
