"""Keeps one base model in memory, and the compiled programs of all trials that were trained on it.

Trials that differ only in `NUMBERS` have the same program. Others have a program of their own, on a model of their own
whose frozen arrays are those of the base.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from gemma_tune.config import Config
from gemma_tune.data import Splits, TokenizedSplits
from gemma_tune.models.functional import assign, parameters
from gemma_tune.models.load import load_configured
from gemma_tune.models.lora.enable import reset_lora
from gemma_tune.models.sharding.placement import mesh_sharding_of
from gemma_tune.models.shared_copy import shared_copy
from gemma_tune.pipeline.program import Program, make_program, schedule_of
from gemma_tune.pipeline.setup import (
    Setup,
    check_adapter_settings,
    count_row_shards,
    make_heldout_batches,
    make_training_batches,
    prepare_data,
)
from gemma_tune.runtime.backend import keras
from gemma_tune.training.batches import HeldoutBatches, TrainingBatches, most_targets
from gemma_tune.tuning.runner.side_by_side import SideBySideSteps, make_side_by_side_steps

# Settings that are inputs of the compiled steps, or of the loop around them.
NUMBERS = (
    "workdir",
    "seed",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.epsilon",
    "optimizer.clip_norm",
    "lora.alpha",
    "lora.dropout",
    "lora.loraplus_lr_ratio",
    "training.num_epochs",
    "training.num_train_steps",
    "training.eval_every_steps",
    "training.checkpoint_every_steps",
    "training.keep_last",
    "training.early_stopping_patience",
    "training.log_every_steps",
    "training.on_bad_step",
    "training.num_sample_answers",
    "training.num_scored_answers",
)
# With these the optimizer's state has a place for all of its numbers.
_ALL_NUMBERS = {"optimizer.weight_decay": 0.01, "optimizer.clip_norm": 1.0, "lora.loraplus_lr_ratio": 2.0}
_SIZES = 16  # Steps in which the number of targets that a program takes is rounded up, of all positions.
_HEADROOM = 1.1  # Another seed may put more targets into a batch than those that were counted.


@dataclasses.dataclass
class _Kept:
    """A program with what trials start from.

    Attributes:
        program: The program.
        num_targets: Most positions with a loss that a micro-batch may have.
        num_heldout_targets: The same of a held-out batch.
        trainable: Trained arrays before the first step, except for LoRA's new factors.
        side_by_side: Steps of several trials at once; None until they are asked for.
    """

    program: Program
    num_targets: int
    num_heldout_targets: int
    trainable: dict[str, Any]
    side_by_side: SideBySideSteps | None = None


class SharedPrograms:
    """One base model, the tokenized data, and the programs of trials.

    Args:
        config: Settings of the search. Its seed splits the data, and makes a tiny model's weights.
        splits: Data of all trials.
        has_dropout: Whether all programs have LoRA's dropout, so that trials with and without it share them.
    """

    def __init__(self, config: Config, splits: Splits, has_dropout: bool = False):
        self._config, self._splits, self._has_dropout = config, splits, has_dropout
        self._base: keras.Model | None = None
        self._base_key: Any = None
        self._data: dict[Any, TokenizedSplits] = {}
        self._programs: dict[Config, _Kept] = {}

    def set_up(self, config: Config) -> Setup:
        """Returns what a trial needs before its first step, as `pipeline.set_up` does for a run.

        Args:
            config: Settings of the trial.
        """
        check_adapter_settings(config)
        base = self._load_base(config)
        num_row_shards = count_row_shards(base)
        data = self._tokenized(config, base)
        batches, heldout = self.make_batches(config)
        key = self.key_of(config)
        kept = self._programs.get(key)
        if kept is None or kept.num_targets < batches.most_targets:
            self._programs.pop(key, None)
            positions = batches.batch_size // (num_row_shards * config.training.grad_accum_steps) * batches.row_length
            sizes, num_heldout = rounded_sizes(batches.target_sizes, positions), most_targets(heldout, num_row_shards)
            model = _copy_of(base, config)
            program = make_program(key, model, sizes, num_heldout, alpha_is_input(config))
            kept = self._programs[key] = _Kept(program, max(sizes), num_heldout, parameters(model).trainable)
        program = kept.program
        assign(program.model, kept.trainable)
        if config.training.method != "full" and not config.model.adapter:
            reset_lora(program.model.backbone, config.seed, config.lora_alpha)
        return Setup(
            config=config,
            model=program.model,
            sharding=program.sharding,
            attention=program.attention,
            precision_advice="",
            data=data,
            data_key=self._splits.content_key,
            batches=batches,
            heldout=heldout,
            frozen=parameters(program.model).frozen,
            state=program.first_state(config, len(batches), take_over=False),
            train_step=program.train_step,
            eval_step=program.eval_step,
            schedule=schedule_of(config, len(batches)),
        )

    def make_batches(self, config: Config) -> tuple[TrainingBatches, HeldoutBatches]:
        """Returns the training batches of a trial by step, and the held-out batches."""
        base = self._load_base(config)
        data = self._tokenized(config, base)
        return make_training_batches(config, data, count_row_shards(base)), make_heldout_batches(config, data)

    def key_of(self, config: Config) -> Config:
        """Returns the settings that shape a trial's program: trials that share it have the same."""
        return program_config(config, self._config.seed, self._has_dropout)

    def side_by_side_steps(self, config: Config) -> SideBySideSteps:
        """Returns the steps of several trials at once. `set_up` has to be called before, for each of the trials.

        Raises:
            ConfigError: They can't be trained side by side.
        """
        key = self.key_of(config)
        kept = self._programs[key]
        if kept.side_by_side is None:
            kept.side_by_side = make_side_by_side_steps(key, kept.program, kept.num_targets, kept.num_heldout_targets)
        return kept.side_by_side

    def _load_base(self, config: Config) -> keras.Model:
        """Returns the base model of a trial. Only one is held: another one takes its place, with its programs."""
        key = config.model, config.quant_spec, config.training.mesh
        if self._base is None or key != self._base_key:
            self._programs.clear()
            self._base = None
            self._base = load_configured(config.replace({"seed": self._config.seed}))
            self._base_key = key
        return self._base

    def _tokenized(self, config: Config, base: keras.Model) -> TokenizedSplits:
        key = config.data.max_length, config.data.overlong
        if key not in self._data:
            self._data[key] = prepare_data(config, self._splits, base)
        return self._data[key]


def _copy_of(base: keras.Model, config: Config) -> keras.Model:
    copy, sharding = shared_copy(base, with_lora=bool(config.model.adapter)), mesh_sharding_of(base.backbone)
    if sharding:
        sharding.place(copy.backbone)
    return copy


def program_config(config: Config, seed: int = 0, has_dropout: bool = False) -> Config:
    """Returns the settings that shape a trial's program, with the same numbers for all trials that may share it.

    Args:
        config: Settings of the trial.
        seed: Random seed of the search.
        has_dropout: Whether the program has LoRA's dropout, though the trial may have none.
    """
    defaults = Config().to_dict()
    numbers: dict[str, Any] = {}
    for path in NUMBERS:
        group, _, name = path.rpartition(".")
        numbers[path] = defaults[group][name] if group else defaults[name]
    numbers |= {"seed": seed, "training.num_epochs": 1, **_ALL_NUMBERS}
    if config.optimizer.name == "adafactor":  # Without a decay or a ratio it computes otherwise.
        numbers["optimizer.weight_decay"] *= bool(config.optimizer.weight_decay)
        numbers["lora.loraplus_lr_ratio"] = 1.0 + (config.lora.loraplus_lr_ratio != 1)
    if (config.lora.dropout or has_dropout) and config.training.method != "full" and not config.training.qat:
        numbers["lora.dropout"] = 0.5
    if not alpha_is_input(config):
        numbers["lora.alpha"] = config.lora.alpha
    return config.replace(numbers)


def alpha_is_input(config: Config) -> bool:
    """Returns whether a trial's program takes LoRA's alpha as an input.

    Quantization-aware training rounds with it, KerasHub's embedding knows it as a constant, and an adapter has its own.
    """
    is_lora = config.training.method != "full" and not config.model.adapter
    return is_lora and not config.training.qat and "token_embedding" not in config.lora.target_layers


def rounded_sizes(sizes: Sequence[int], num_positions: int) -> tuple[int, ...]:
    """Returns numbers of targets that hold those of other seeds too, as far as one can tell.

    Args:
        sizes: Numbers of target positions, ascending (`TrainingBatches.target_sizes`).
        num_positions: Number of positions of a micro-batch.
    """
    unit = max(1, num_positions // _SIZES)
    *usual, most = sizes
    rounded = {math.ceil(size / unit) * unit for size in usual} | {math.ceil(most * _HEADROOM / unit) * unit}
    return tuple(sorted({min(size, num_positions) for size in rounded}))
