"""Searches hyperparameters with Optuna."""

from gemma_tune.tuning.start import tune

__all__ = ["tune"]
