"""Settings to train with on all data, once a search has found the best ones."""

from typing import Any

from gemma_tune.config import Config
from gemma_tune.data.mixture import parse_mixture
from gemma_tune.data.sources.readers import resolve_files
from gemma_tune.data.splits import heldout_source
from gemma_tune.errors import ConfigError

_TFDS = "tfds:"


def on_all_data(config: Config, best_step: int, num_train: int, num_heldout: int) -> Config:
    """Returns the settings with which the held-out examples are trained on too, as often as the others.

    Nothing is held out then, so that no step can be chosen: training ends after the best step of the search, times the
    growth of the data, and its schedule with it.

    Args:
        config: Best settings of the search.
        best_step: Step of its best held-out value.
        num_train: Number of training examples.
        num_heldout: Number of held-out examples.

    Raises:
        ConfigError: The two data sets can't be joined.
    """
    data, changes = config.data, {"data.eval_source": "", "data.eval_split": "", "data.eval_fraction": 0.0}
    eval_source = heldout_source(data.source, data.eval_source, data.eval_split)
    if eval_source:
        changes |= _joined(data.source, eval_source, data.split, data.eval_split)
    num_steps = round(best_step * (num_train + num_heldout) / num_train)
    return config.replace(
        {
            **changes,
            "training.num_train_steps": max(1, num_steps),
            "training.eval_every_steps": 0,
            "training.early_stopping_patience": 0,
            "training.best_by": "loss",
            "training.eval_metrics": (),
            "training.num_sample_answers": 0,
            "training.num_scored_answers": 0,
        }
    )


def _joined(source: str, eval_source: str, split: str, eval_split: str) -> dict[str, Any]:
    if source.startswith(_TFDS) and source == eval_source:
        return {"data.split": f"{split}+{eval_split}"}
    has_weights = any(part.weight is not None for part in parse_mixture(source))
    if not (has_weights or source.startswith(_TFDS) or eval_source.startswith(_TFDS)):
        files = [*resolve_files(source, split), *resolve_files(eval_source, eval_split or split)]
        if len(set(files)) == len(files):  # Otherwise one file holds both splits.
            return {"data.source": ",".join(map(str, files))}
    raise ConfigError(
        f"{source} and {eval_source} can't be read as one. Leave --retrain out, and train with the best "
        "settings on a file that holds both."
    )
