"""Prepares a run: data, model, batches, training state and steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from gemma_tune.config import Config
from gemma_tune.data import (
    Splits,
    TokenizedSplits,
    load_splits,
    template_for,
    tokenize_splits,
)
from gemma_tune.errors import ConfigError
from gemma_tune.evaluation import evaluate_batches
from gemma_tune.models.attention.choice import AttentionChoice, first_device
from gemma_tune.models.family import family_of
from gemma_tune.models.functional import Params, parameters
from gemma_tune.models.load import load_configured
from gemma_tune.models.precision import check_precision
from gemma_tune.models.sharding.placement import MeshSharding, mesh_sharding_of
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.models.transforms import LoraSettings, Transformed, transform_for_training
from gemma_tune.runtime.backend import cache_dir, keras
from gemma_tune.training.batches import HeldoutBatches, OnMesh, TrainingBatches, most_targets
from gemma_tune.training.optimizer import make_optimizer, make_schedule
from gemma_tune.training.state import TrainState, init_state
from gemma_tune.training.step.per_block import per_block_program
from gemma_tune.training.step.train_step import make_eval_step, make_train_step


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
        return evaluate_batches(lambda batch: self.eval_step(trainable, self.frozen, batch), heldout, before_each)

    def on_devices(self, batches: Any) -> Any:
        """Returns batches that are put on the devices of the mesh, if there is one."""
        return OnMesh(batches, self.sharding) if self.sharding else batches

    def origins(self, step: int) -> list[str]:
        """Returns where the examples of a step, counted from 0, come from."""
        return [self.data.train_examples[index].origin for index in self.batches.example_indices(step)]


def read_splits(config: Config) -> Splits:
    """Reads, cleans and splits the data. This needs no model, so that bad data fails at once."""
    data = config.data
    family_tokens = {token for family in ("gemma3", "gemma4") for token in template_for(family).control_tokens}
    return load_splits(
        data.source,
        sorted(family_tokens),
        eval_source=data.eval_source,
        split=data.split,
        eval_split=data.eval_split,
        eval_fraction=data.eval_fraction,
        system_prompt=data.system_prompt,
        on_error=data.on_error,
        seed=config.seed,
        cache=cache_dir(),
    )


def prepare_data(config: Config, splits: Splits, model: keras.Model) -> TokenizedSplits:
    """Tokenizes the data for a model."""
    template, tokenizer = template_for(family_of(model)), tokenizer_of(model)
    return tokenize_splits(splits, template, tokenizer, config.data.max_length, config.data.overlong, cache=cache_dir())


def set_up(config: Config, splits: Splits) -> Setup:
    """Loads and transforms the model, and makes batches, state and steps. Nothing is compiled yet.

    Args:
        config: Settings of the run.
        splits: From `read_splits`.
    """
    training = config.training
    _check_adapter(config)
    precision_advice = check_precision(first_device(), config.model.precision)
    model = load_configured(config)
    sharding = mesh_sharding_of(model.backbone)
    num_row_shards = sharding.shape.num_row_shards if sharding else 1
    data = prepare_data(config, splits, model)
    program, attention = _transform(config, model, sharding)
    per_block = per_block_program(program, model, training.remat)
    batches = _training_batches(config, data, num_row_shards)
    heldout = HeldoutBatches(data.heldout, training.batch_size, config.row_length, config.data.packing)
    schedule = _schedule(config, len(batches))
    optimizer = make_optimizer(schedule=schedule, **config.optimizer_settings)
    return Setup(
        config=config,
        model=model,
        sharding=sharding,
        attention=attention,
        precision_advice=precision_advice,
        data=data,
        data_key=splits.key,
        batches=batches,
        heldout=heldout,
        frozen=parameters(model).frozen,
        state=init_state(model, optimizer, take_over=True, guarded=True, sharding=sharding),
        train_step=make_train_step(
            model,
            optimizer,
            batches.target_sizes,
            training.grad_accum_steps,
            per_block,
            training.loss_spike_factor,
            sharding,
        ),
        eval_step=make_eval_step(model, most_targets(heldout, num_row_shards), per_block, sharding),
        schedule=schedule,
    )


def _transform(config: Config, model: keras.Model, sharding: MeshSharding | None) -> Transformed:
    """Transforms the loaded model for training."""
    training = config.training
    return transform_for_training(
        model,
        None if training.method == "full" else LoraSettings(**config.lora_settings),
        qat=config.qat_spec,
        packing=config.data.packing,
        remat=training.remat,
        program=training.program,
        attention=training.attention,
        row_length=config.row_length,
        sharding=sharding,
        keeps_factors=bool(config.model.adapter),
    )


def _training_batches(config: Config, data: TokenizedSplits, num_row_shards: int) -> TrainingBatches:
    training = config.training
    return TrainingBatches(
        data.train,
        batch_size=training.batch_size,
        row_length=config.row_length,
        packing=config.data.packing,
        seed=config.seed,
        num_epochs=training.num_epochs,
        num_train_steps=training.num_train_steps,
        num_parts=num_row_shards * training.grad_accum_steps,
    )


def _schedule(config: Config, num_train_steps: int) -> optax.Schedule:
    return make_schedule(
        config.optimizer.schedule, config.learning_rate, config.optimizer.warmup_steps, num_train_steps
    )


def _check_adapter(config: Config) -> None:
    """Raises ConfigError if settings of `lora` would have no effect, since the adapter has its own."""
    defaults, given = dataclasses.asdict(Config().lora), dataclasses.asdict(config.lora)
    changed = [name for name in given if given[name] != defaults[name] and name != "loraplus_lr_ratio"]
    if config.model.adapter and config.training.method != "full" and changed:
        raise ConfigError(
            f"model.adapter={config.model.adapter} continues training the adapter's own factors, so lora.{changed[0]} "
            "would have no effect. Remove one of the two settings."
        )
