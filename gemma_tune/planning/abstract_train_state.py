"""Builds a run's train state from shapes alone, without weights, data or devices."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh

from gemma_tune.config import Config
from gemma_tune.data import Batch
from gemma_tune.errors import ConfigError
from gemma_tune.mesh import MeshShape
from gemma_tune.models.family import FAMILIES, family_of
from gemma_tune.models.functional import variables_by_path
from gemma_tune.models.precision import computes_in_float16
from gemma_tune.models.sharding.placement import MeshSharding
from gemma_tune.models.sources.lazy_initialization import lazy_initialization
from gemma_tune.models.sources.published_sizes import backbone_without_weights
from gemma_tune.models.transforms import LoraSettings, transform_for_training
from gemma_tune.runtime.backend import keras
from gemma_tune.training.guard import init_guard
from gemma_tune.training.losses.loss_scale import init_loss_scale
from gemma_tune.training.optimizer import (
    Hyperparameters,
    as_float32,
    make_hyperparameters,
    make_optimizer,
    make_schedule,
)
from gemma_tune.training.state import TrainState
from gemma_tune.training.state_shardings import optimizer_shardings
from gemma_tune.training.step.compile_once import StepMemory
from gemma_tune.training.step.train_step import make_train_step

Shapes = Any  # A tree of jax.ShapeDtypeStruct.


class AbstractTrainState(NamedTuple):
    """A run before its first step, with shapes in place of arrays.

    Attributes:
        config: Settings of the run.
        model: CausalLM whose variables have no values.
        sharding: Shardings on the mesh; None for one device.
        optimizer: Optimizer.
        num_targets: Number of positions with a loss in a device's rows of a micro-batch.
        target_share: Share of all positions that have a loss.
        state: Shapes of the TrainState.
        frozen: Shapes of the frozen weights, by path.
        batch: Shapes of a Batch.
    """

    config: Config
    model: keras.Model
    sharding: MeshSharding | None
    optimizer: optax.GradientTransformation
    num_targets: int
    target_share: float
    state: Shapes
    frozen: Shapes
    batch: Shapes

    @property
    def argument_bytes(self) -> int:
        """Returns the bytes of weights, optimizer state and a batch on each device."""
        return sum(bytes_per_device(leaf) for leaf in jax.tree.leaves((self.state, self.frozen, self.batch)))

    def compiled_memory(self) -> StepMemory:
        """Compiles the training step and returns XLA's count of its memory on each device. The mesh needs devices."""
        training = self.config.training
        step = make_train_step(
            self.model,
            self.optimizer,
            self.num_targets,
            training.grad_accum_steps,
            None,
            training.loss_spike_factor,
            self.sharding,
        )
        return step.memory(self.state, self.frozen, self.batch)  # type: ignore[attr-defined]


def abstract_train_state(
    config: Config, shape: MeshShape, target_share: float, mesh: Mesh | None = None
) -> AbstractTrainState:
    """Prepares a run as `pipeline.set_up` does, but without weights and data.

    Args:
        config: Settings of the run. `training.mesh` is not read.
        shape: Shape of the mesh. It divides the rows of a micro-batch evenly.
        target_share: Share of all positions that have a loss.
        mesh: Mesh of devices to compile for; None for an abstract one, which needs no devices.

    Raises:
        ModelError: The model's sizes are unknown.
        ConfigError: The config names an adapter.
    """
    training = config.training
    sharding = None
    if shape.num_devices > 1:
        types = (AxisType.Auto,) * len(shape)
        places: Any = mesh or AbstractMesh(tuple(shape), MeshShape._fields, axis_types=types)
        sharding = MeshSharding(places)
    model = _model(config, sharding)
    rows_at_a_time = training.batch_size // training.grad_accum_steps // shape.num_row_shards
    trainable, frozen = _parameters(model)
    schedule = make_schedule("constant", config.learning_rate, 0, 1)
    optimizer = make_optimizer(config.optimizer.name, schedule, **config.optimizer_numbers)
    hyperparameters = make_hyperparameters(schedule, **config.optimizer_numbers)
    return AbstractTrainState(
        config=config,
        model=model,
        sharding=sharding,
        optimizer=optimizer,
        num_targets=_num_targets(target_share, rows_at_a_time * config.row_length),
        target_share=target_share,
        state=_state(model, optimizer, hyperparameters, trainable, sharding),
        frozen=frozen,
        batch=_batch(training.batch_size, config.row_length, sharding),
    )


def with_batch_size(run: AbstractTrainState, batch_size: int) -> AbstractTrainState:
    """Returns the same run with another batch size, which its mesh and micro-batches must divide evenly."""
    config = run.config.replace({"training.batch_size": batch_size})
    parts = config.training.grad_accum_steps * (run.sharding.shape.num_row_shards if run.sharding else 1)
    return run._replace(
        config=config,
        num_targets=_num_targets(run.target_share, batch_size // parts * config.row_length),
        batch=_batch(batch_size, config.row_length, run.sharding),
    )


def _num_targets(share: float, num_positions: int) -> int:
    return max(1, round(share * num_positions))


def bytes_per_device(leaf: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes of an array's shard on one device."""
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize


def _model(config: Config, sharding: MeshSharding | None) -> keras.Model:
    training = config.training
    if config.model.adapter:
        raise ConfigError(
            "A plan can't read an adapter. Leave out model.adapter, and set lora.* to the adapter's settings."
        )
    backbone = backbone_without_weights(config.model.source, config.model.precision, config.quant_spec, sharding)
    model = FAMILIES[family_of(backbone)].causal_lm(preprocessor=None, backbone=backbone)
    lora = LoraSettings(**config.lora_settings)
    with lazy_initialization():
        transform_for_training(
            model,
            None if training.method == "full" else lora,
            qat=config.qat_spec,
            packing=config.data.packing,
            remat=training.remat,
            program="whole",
            attention=training.attention,
            row_length=config.row_length,
            sharding=sharding,
        )
    return model


def _parameters(model: keras.Model) -> tuple[dict[str, Any], dict[str, Any]]:
    trained = {id(variable) for variable in model.backbone.trainable_variables}
    groups: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for path, variable in variables_by_path(model).items():
        shape = jax.ShapeDtypeStruct(tuple(variable.shape), variable.dtype, sharding=variable._layout)
        groups[id(variable) not in trained][path] = shape
    return groups


def _state(
    model: keras.Model,
    optimizer: optax.GradientTransformation,
    hyperparameters: Hyperparameters,
    trainable: dict[str, Any],
    sharding: MeshSharding | None,
) -> Shapes:
    shapes = jax.eval_shape(
        lambda params: TrainState(
            jnp.zeros((), jnp.int32),
            params,
            optimizer.init(as_float32(params)),
            init_loss_scale() if computes_in_float16(model) else None,
            init_guard(),
            hyperparameters.as_arrays(),
        ),
        trainable,
    )
    if sharding is None:
        return shapes
    everywhere = shapes._replace(trainable=None, opt_state=None)
    everywhere = jax.tree.map(lambda leaf: _placed(leaf, sharding.replicated), everywhere)
    places = optimizer_shardings(optimizer, trainable, sharding)
    return everywhere._replace(trainable=trainable, opt_state=jax.tree.map(_placed, shapes.opt_state, places))


def _placed(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _batch(num_rows: int, row_length: int, sharding: MeshSharding | None) -> Batch:
    shape, place = (num_rows, row_length), sharding.batch if sharding else None
    ids: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    weights: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    return Batch(ids, ids, ids, ids, weights)
