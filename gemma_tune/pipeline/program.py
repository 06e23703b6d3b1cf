"""A model transformed for training, with its compiled steps. Runs that differ in numbers alone can share it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import optax

from gemma_tune.config import Config
from gemma_tune.models.attention.choice import AttentionChoice
from gemma_tune.models.sharding.placement import MeshSharding, mesh_sharding_of
from gemma_tune.models.transforms import LoraSettings, transform_for_training
from gemma_tune.runtime.backend import keras
from gemma_tune.training.optimizer import Schedule, make_hyperparameters, make_optimizer, make_schedule
from gemma_tune.training.state import TrainState, init_state
from gemma_tune.training.step.per_block import per_block_program
from gemma_tune.training.step.train_step import make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A transformed model and its steps, each compiled when first called.

    Attributes:
        model: CausalLM, transformed for training.
        sharding: Mesh sharding of the model; None on one device.
        attention: Attention kernel, and why it was chosen.
        optimizer: From `make_optimizer`.
        train_step: From `make_train_step`.
        eval_step: From `make_eval_step`.
    """

    model: keras.Model
    sharding: MeshSharding | None
    attention: AttentionChoice
    optimizer: optax.GradientTransformationExtraArgs
    train_step: Any
    eval_step: Any

    def first_state(self, config: Config, num_train_steps: int, take_over: bool) -> TrainState:
        """Returns the state before a run's first step, with the run's hyperparameters.

        Args:
            config: Settings of the run, which differ in numbers alone from those that the program was made of.
            num_train_steps: Number of steps of the run.
            take_over: Whether the state's arrays are also the model's (`init_state`).
        """
        return init_state(
            self.model,
            self.optimizer,
            take_over=take_over,
            guarded=True,
            sharding=self.sharding,
            hyperparameters=make_hyperparameters(
                schedule_of(config, num_train_steps),
                lora_dropout=config.lora.dropout,
                seed=config.seed,
                **config.optimizer_numbers,
            ),
        )


def make_program(
    config: Config,
    model: keras.Model,
    num_targets: Sequence[int],
    num_heldout_targets: int,
    alpha_is_input: bool = False,
) -> Program:
    """Transforms a loaded model for training, and makes its steps. Nothing is compiled yet.

    Args:
        config: Settings of the run.
        model: CausalLM from `load_configured`.
        num_targets: Most positions with a loss in a micro-batch, as for `make_train_step`.
        num_heldout_targets: The same in a held-out batch.
        alpha_is_input: Whether LoRA's alpha may be changed later (`transform_for_training`).
    """
    training, sharding = config.training, mesh_sharding_of(model.backbone)
    kind, attention = transform_for_training(
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
        alpha_is_input=alpha_is_input,
        dropout=bool(config.lora.dropout),
    )
    per_block = per_block_program(kind, model, training.remat)
    # The numbers themselves come with the state; here they say which of them the optimizer has at all.
    optimizer = make_optimizer(config.optimizer.name, schedule_of(config, 1), **config.optimizer_numbers)
    return Program(
        model=model,
        sharding=sharding,
        attention=attention,
        optimizer=optimizer,
        train_step=make_train_step(
            model,
            optimizer,
            num_targets,
            training.grad_accum_steps,
            per_block,
            training.loss_spike_factor,
            sharding,
        ),
        eval_step=make_eval_step(model, num_heldout_targets, per_block, sharding),
    )


def schedule_of(config: Config, num_train_steps: int) -> Schedule:
    """Returns the learning rate by step."""
    return make_schedule(
        config.optimizer.schedule, config.learning_rate, config.optimizer.warmup_steps, num_train_steps
    )
