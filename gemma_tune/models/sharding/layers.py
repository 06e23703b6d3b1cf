"""Makes a model's layers compute on a mesh: decoder blocks gather weights, embeddings look up rows by shard.

The rest, the products that are cut along the axis `model` among it, GSPMD (arXiv:2105.04663) derives from the shardings
of the weights and of the hidden states between the blocks, which are given here.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_tune.models.functional import value_in_scope
from gemma_tune.models.layers import iter_layers
from gemma_tune.models.lm_head import LMHead, gather_lm_head_rows, num_rows, with_dequantized_scales
from gemma_tune.models.sharding.placement import BATCH_AXES, MeshSharding
from gemma_tune.runtime.backend import keras, keras_hub

_inputs_are_sharded = contextvars.ContextVar("inputs_are_sharded", default=False)


@contextlib.contextmanager
def batch_sharded_inputs() -> Iterator[None]:
    """A context in which the model's inputs are sharded along their rows, as the batches of training are.

    Outside of it, in decoding, there are too few rows for that.
    """
    token = _inputs_are_sharded.set(True)
    try:
        yield
    finally:
        _inputs_are_sharded.reset(token)


def enable_mesh_sharding(backbone: keras_hub.models.Backbone, sharding: MeshSharding) -> None:
    """Makes a backbone's decoder blocks and embeddings compute on a mesh. Decoding with a KV cache is left to GSPMD.

    Args:
        backbone: Backbone whose variables are on the mesh already. Remat is to be enabled afterwards, so that gathered
            weights are dropped after the forward pass.
        sharding: Mesh sharding of the variables.
    """
    if hasattr(backbone.transformer_layers[0].attention, "_mesh_sharding"):
        return
    for block in backbone.transformer_layers:
        object.__setattr__(block, "call", _gathering_call(block, block.call, sharding))
        object.__setattr__(block.attention, "_mesh_sharding", sharding)
    for layer in iter_layers(backbone, keras.layers.Embedding):
        object.__setattr__(layer, "call", _sharded_lookup_call(layer, layer.call, sharding))


def _gathering_call(block: Any, call: Callable, sharding: MeshSharding) -> Callable:
    def gathering_call(*args: Any, **named: Any) -> Any:
        if not keras.src.backend.common.stateless_scope.in_stateless_scope() or named.get("cache") is not None:
            return call(*args, **named)
        mapping = [(variable, _gathered(value_in_scope(variable), variable._layout)) for variable in block.variables]
        with keras.StatelessScope(state_mapping=mapping):
            outputs = call(*(_constrain_hidden(sharding, value) for value in args), **named)
        return jax.tree.map(functools.partial(_constrain_hidden, sharding), outputs)

    return gathering_call


def _constrain_hidden(sharding: MeshSharding, value: Any) -> Any:
    """Keeps hidden states, [B, L, D], sharded along their rows alone. Other values stay as they are."""
    is_hidden = isinstance(value, jax.Array) and value.ndim == 3
    return lax.with_sharding_constraint(value, sharding.batch) if is_hidden else value


def _gathered(value: jax.Array, named_sharding: NamedSharding) -> jax.Array:
    """Gathers the parts of a weight along the axis `fsdp`."""
    mesh, spec = named_sharding.mesh, named_sharding.spec
    gathered = NamedSharding(mesh, P(*(None if axis == "fsdp" else axis for axis in spec)))
    if gathered.spec == spec or mesh.shape["fsdp"] == 1:
        return value
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return lax.with_sharding_constraint(value, gathered)
    return _gather(gathered, named_sharding, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(gathered: NamedSharding, parts: NamedSharding, value: jax.Array) -> jax.Array:
    """Gathers a weight. Its gradient is scattered to where the parts are.

    That the value is in parts is said first. Else GSPMD would gather it before the branch that the backward pass is on
    CPU, once for both passes, and hold it in between.
    """
    return lax.with_sharding_constraint(lax.with_sharding_constraint(value, parts), gathered)


_gather.defvjp(
    lambda gathered, parts, value: (_gather(gathered, parts, value), None),
    lambda gathered, parts, _, gradient: (lax.with_sharding_constraint(gradient, parts),),
)


def _sharded_lookup_call(layer: Any, call: Callable, sharding: MeshSharding) -> Callable:
    def sharded_lookup_call(inputs: Any, *args: Any, **named: Any) -> Any:
        if args or named or not _inputs_are_sharded.get():  # `reverse`, or decoding.
            return call(inputs, *args, **named)
        table = layer.lm_head() if hasattr(layer, "lm_head") else keras.ops.convert_to_tensor(layer.embeddings)
        return sharded_lookup(sharding, table, jnp.asarray(inputs, jnp.int32)).astype(layer.compute_dtype)

    return sharded_lookup_call


def sharded_lookup(sharding: MeshSharding, table: LMHead, ids: jax.Array) -> jax.Array:
    """Looks up rows of an embedding that is sharded along its rows, for ids that are sharded along theirs.

    Args:
        sharding: Mesh sharding of the model.
        table: [V, D] embedding: floats, quantized, or floats that count as rounded.
        ids: [B, L] int32 indices.

    Returns:
        [B, L, D] rows, sharded as the ids are.
    """
    table = with_dequantized_scales(table)
    axes = sharding.vocabulary_axes(num_rows(table))

    def local(shard: Any, ids: jax.Array) -> jax.Array:
        return lookup_in_shard(shard, ids.reshape(-1), axes).reshape(*ids.shape, -1)

    rows = P(BATCH_AXES)
    lookup = jax.shard_map(local, mesh=sharding.mesh, in_specs=(P(axes or None), rows), out_specs=rows)
    return lookup(table, ids)


def lookup_in_shard(shard: LMHead, ids: jax.Array, vocabulary_axes: tuple[str, ...]) -> jax.Array:
    """Looks up rows of a sharded embedding within a `shard_map` over the mesh.

    Each device looks up those rows of its shard that any device asks for, and a reduction over the devices puts them
    together.

    Args:
        shard: This device's rows of the embedding.
        ids: [T] int32 indices that this device asks for. Devices along the axis `model` ask for the same.
        vocabulary_axes: Mesh axes that the embedding is cut along, the outer one first.

    Returns:
        [T, D] rows.
    """
    if not vocabulary_axes:
        return gather_lm_head_rows(shard, ids)
    asked = lax.all_gather(ids, "fsdp", tiled=True) if "fsdp" in vocabulary_axes else ids
    index = asked - lax.axis_index(vocabulary_axes) * num_rows(shard)
    is_here = (index >= 0) & (index < num_rows(shard))
    rows = jnp.where(is_here[:, None], gather_lm_head_rows(shard, jnp.where(is_here, index, 0)), 0)
    if "model" in vocabulary_axes:
        rows = lax.psum(rows, "model")
    return lax.psum_scatter(rows, "fsdp", tiled=True) if "fsdp" in vocabulary_axes else rows
