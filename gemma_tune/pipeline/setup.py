"""Prepares a run: data, model, batches, training state and steps."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from gemma_tune.config import Config
from gemma_tune.data import (
    Splits,
    TokenizedSplits,
    load_splits,
    template_for,
    tokenize_splits,
)
from gemma_tune.data.chat_template import all_control_tokens
from gemma_tune.data.example import Row
from gemma_tune.data.mixture import EpochSampler, examples_per_epoch, parse_mixture
from gemma_tune.data.rows.row_options import RowOptions
from gemma_tune.data.sources.readers import read_rows
from gemma_tune.data.splits import heldout_source
from gemma_tune.errors import ConfigError
from gemma_tune.evaluation import evaluate_batches
from gemma_tune.models.attention.choice import AttentionChoice, first_device
from gemma_tune.models.family import family_of
from gemma_tune.models.functional import Params, parameters
from gemma_tune.models.load import load_configured
from gemma_tune.models.precision import check_precision
from gemma_tune.models.sharding.placement import MeshSharding, mesh_sharding_of
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.pipeline.program import make_program, schedule_of
from gemma_tune.runtime.backend import cache_dir, keras
from gemma_tune.training.batches import HeldoutBatches, OnMesh, TrainingBatches, most_targets
from gemma_tune.training.state import TrainState


@dataclasses.dataclass
class Setup:
    """Everything that a run needs before its first step.

    Attributes:
        config: Settings of the run.
        model: CausalLM, transformed for training.
        sharding: Mesh sharding of the model; None on one device.
        attention: Attention kernel, and why it was chosen.
        precision_advice: Advice if another precision suits the device better; '' if not.
        data: Tokenized training and held-out examples.
        data_key: Key that changes with the content of the data and with its preparation.
        batches: Training batches by step.
        heldout: Held-out batches.
        frozen: Frozen weights by variable path.
        state: Training state before the first step.
        train_step: From `make_train_step`.
        eval_step: From `make_eval_step`.
        schedule: Learning rate by step.
    """

    config: Config
    model: keras.Model
    sharding: MeshSharding | None
    attention: AttentionChoice
    precision_advice: str
    data: TokenizedSplits
    data_key: str
    batches: TrainingBatches
    heldout: HeldoutBatches
    frozen: dict[str, jax.Array]
    state: TrainState
    train_step: Any
    eval_step: Any
    schedule: Any

    def evaluate(self, trainable: Params, before_each: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Returns held-out metrics.

        Args:
            trainable: Trained weights by variable path.
            before_each: Called before each batch; may raise to stop the evaluation.
        """
        heldout = self.on_devices(self.heldout)
        names = self.data.source_labels
        labels = [names[group] for group in self.heldout.group_of] if len(set(self.heldout.group_of)) > 1 else []
        return evaluate_batches(
            lambda batch: self.eval_step(trainable, self.frozen, batch), heldout, before_each, labels
        )

    def on_devices(self, batches: Any) -> Any:
        """Returns batches that are put on the devices of the mesh, if there is one."""
        return OnMesh(batches, self.sharding) if self.sharding else batches

    def origins(self, step: int) -> list[str]:
        """Returns where the examples of a step, counted from 0, come from."""
        return [self.data.train_examples[index].origin for index in self.batches.example_indices(step)]


def read_splits(config: Config) -> Splits:
    """Reads, cleans and splits the data. This needs no model, so that bad data fails at once."""
    data = config.data
    return load_splits(
        data.source,
        all_control_tokens(),
        eval_source=data.eval_source,
        split=data.split,
        eval_split=data.eval_split,
        eval_fraction=data.eval_fraction,
        system_prompt=data.system_prompt,
        on_error=data.on_error,
        dedup=data.dedup,
        near_dedup_threshold=data.near_dedup_threshold,
        seed=config.seed,
        cache=cache_dir(),
        options=row_options(config),
    )


def row_options(config: Config) -> RowOptions:
    """Returns the settings of how rows become turns."""
    data = config.data
    return RowOptions(data.columns, data.prompt_template, data.on_role_order, data.thoughts)


def heldout_rows(config: Config) -> Iterator[Row]:
    """Yields the rows of the source that held-out examples come from; unreadable ones are left out."""
    data = config.data
    source = heldout_source(data.source, data.eval_source, data.eval_split) or data.source
    split = data.eval_split or data.split
    for part in parse_mixture(source):
        yield from read_rows(part.source, split, lambda error: None)


def prepare_data(config: Config, splits: Splits, model: keras.Model) -> TokenizedSplits:
    """Tokenizes the data for a model."""
    tokenizer = tokenizer_of(model)
    template = template_for(family_of(model), tokenizer)
    return tokenize_splits(splits, template, tokenizer, config.data.max_length, config.data.overlong, cache=cache_dir())


def set_up(config: Config, splits: Splits) -> Setup:
    """Loads and transforms the model, and makes batches, state and steps. Nothing is compiled yet.

    Args:
        config: Settings of the run.
        splits: From `read_splits`.
    """
    check_adapter_settings(config)
    precision_advice = check_precision(first_device(), config.model.precision)
    model = load_configured(config)
    num_row_shards = count_row_shards(model)
    data = prepare_data(config, splits, model)
    batches = make_training_batches(config, data, num_row_shards)
    heldout = make_heldout_batches(config, data)
    program = make_program(config, model, batches.target_sizes, most_targets(heldout, num_row_shards))
    return Setup(
        config=config,
        model=model,
        sharding=program.sharding,
        attention=program.attention,
        precision_advice=precision_advice,
        data=data,
        data_key=splits.content_key,
        batches=batches,
        heldout=heldout,
        frozen=parameters(model).frozen,
        state=program.first_state(config, len(batches), take_over=True),
        train_step=program.train_step,
        eval_step=program.eval_step,
        schedule=schedule_of(config, len(batches)),
    )


def count_row_shards(model: keras.Model) -> int:
    """Returns the number of parts that a mesh cuts the rows of a batch into; 1 on one device."""
    sharding = mesh_sharding_of(model.backbone)
    return sharding.shape.num_row_shards if sharding else 1


def make_training_batches(config: Config, data: TokenizedSplits, num_row_shards: int) -> TrainingBatches:
    """Returns the training batches of a run, by step."""
    training = config.training
    counts = mixture_counts(config, data)
    sizes = np.bincount(data.train_sources, minlength=len(counts))
    sampler = None if np.array_equal(counts, sizes) else EpochSampler(data.train_sources, counts, config.seed)
    return TrainingBatches(
        data.train,
        batch_size=training.batch_size,
        row_length=config.row_length,
        packing=config.data.packing,
        seed=config.seed,
        num_epochs=training.num_epochs,
        num_train_steps=training.num_train_steps,
        num_parts=num_row_shards * training.grad_accum_steps,
        sampler=sampler,
    )


def mixture_counts(config: Config, data: TokenizedSplits) -> np.ndarray:
    """Returns how many training examples of each source of `data.source` an epoch has, [s] int64.

    Raises:
        DataError: A source with a weight has no example.
    """
    parts, settings = parse_mixture(config.data.source), config.data
    return examples_per_epoch(
        np.bincount(data.train_sources, minlength=len(parts)),
        parts,
        settings.mixture_temperature,
        settings.mixture_max_repeats,
        settings.mixture_max_examples,
    )


def make_heldout_batches(config: Config, data: TokenizedSplits) -> HeldoutBatches:
    """Returns the held-out batches of a run."""
    groups = data.heldout_sources
    return HeldoutBatches(data.heldout, config.training.batch_size, config.row_length, config.data.packing, groups)


def check_adapter_settings(config: Config) -> None:
    """Raises ConfigError if settings of `lora` would have no effect, since the adapter has its own."""
    defaults, given = dataclasses.asdict(Config().lora), dataclasses.asdict(config.lora)
    changed = [name for name in given if given[name] != defaults[name] and name not in ("dropout", "loraplus_lr_ratio")]
    if config.model.adapter and config.training.method != "full" and changed:
        raise ConfigError(
            f"model.adapter={config.model.adapter} continues training the adapter's own factors, so lora.{changed[0]} "
            "would have no effect. Remove one of the two settings."
        )
