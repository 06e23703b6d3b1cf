"""What the layers of a model do on a mesh: blocks gather their weights, embeddings fetch rows from where they lie.

The rest, the products that are cut along `model` among it, GSPMD (arXiv:2105.04663) finds from the places of the
weights and from those of the hidden states, which are given here between the blocks.
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
from gemma_tune.models.lm_head import gather_lm_head_rows, num_rows, with_dequantized_scales
from gemma_tune.models.sharding.placement import BATCH_AXES, MeshSharding
from gemma_tune.runtime.backend import keras, keras_hub

_rows_are_cut = contextvars.ContextVar("rows_are_cut", default=False)


@contextlib.contextmanager
def batch_sharded_inputs() -> Iterator[None]:
    """Within it, the rows of what a model reads are cut as a batch's are. Decoding has too few for that."""
    token = _rows_are_cut.set(True)
    try:
        yield
    finally:
        _rows_are_cut.reset(token)


def enable_mesh_sharding(backbone: keras_hub.models.Backbone, sharding: MeshSharding) -> None:
    """Makes a backbone's blocks and embeddings read batches on a mesh; decoding with a cache is left to GSPMD.

    Args:
        backbone: Before remat is enabled, so that gathered weights are forgotten after the forward pass.
        sharding: Where its variables lie already.
    """
    if hasattr(backbone.transformer_layers[0].attention, "_mesh_sharding"):
        return
    for block in backbone.transformer_layers:
        object.__setattr__(block, "call", _gathering_call(block, block.call, sharding))
        object.__setattr__(block.attention, "_mesh_sharding", sharding)
    for layer in iter_layers(backbone, keras.layers.Embedding):
        object.__setattr__(layer, "call", _fetching_call(layer, layer.call, sharding))


def _gathering_call(block: Any, call: Callable, sharding: MeshSharding) -> Callable:
    def gathering_call(*args: Any, **named: Any) -> Any:
        if not keras.src.backend.common.stateless_scope.in_stateless_scope() or named.get("cache") is not None:
            return call(*args, **named)
        mapping = [(variable, _gathered(value_in_scope(variable), variable._layout)) for variable in block.variables]
        with keras.StatelessScope(state_mapping=mapping):
            outputs = call(*(_as_rows(sharding, value) for value in args), **named)
        return jax.tree.map(functools.partial(_as_rows, sharding), outputs)

    return gathering_call


def _as_rows(sharding: MeshSharding, value: Any) -> Any:
    """Keeps hidden states, [B, L, D], whole but for their rows."""
    is_hidden = isinstance(value, jax.Array) and value.ndim == 3
    return lax.with_sharding_constraint(value, sharding.batch) if is_hidden else value


def _gathered(value: jax.Array, sharding: NamedSharding) -> jax.Array:
    whole = NamedSharding(sharding.mesh, P(*(None if axis == "fsdp" else axis for axis in sharding.spec)))
    if whole.spec == sharding.spec or sharding.mesh.shape["fsdp"] == 1:
        return value
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return lax.with_sharding_constraint(value, whole)
    return _gather(whole, sharding, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(whole: NamedSharding, part: NamedSharding, value: jax.Array) -> jax.Array:
    """Gathers a weight; its gradient goes to where its parts are. That the value lies in parts is said first: else
    GSPMD gathers it before the branch that the backward pass is on CPU, once for both passes, and holds it in between.
    """
    return lax.with_sharding_constraint(lax.with_sharding_constraint(value, part), whole)


_gather.defvjp(
    lambda whole, part, value: (_gather(whole, part, value), None),
    lambda whole, part, _, gradient: (lax.with_sharding_constraint(gradient, part),),
)


def _fetching_call(layer: Any, call: Callable, sharding: MeshSharding) -> Callable:
    def fetching_call(inputs: Any, *args: Any, **named: Any) -> Any:
        if args or named or not _rows_are_cut.get():  # `reverse`, or decoding.
            return call(inputs, *args, **named)
        table = layer.lm_head() if hasattr(layer, "lm_head") else keras.ops.convert_to_tensor(layer.embeddings)
        return sharded_lookup(sharding, table, jnp.asarray(inputs, jnp.int32)).astype(layer.compute_dtype)

    return fetching_call


def sharded_lookup(sharding: MeshSharding, table: Any, ids: jax.Array) -> jax.Array:
    """Returns [B, L, D] rows of an embedding for ids [B, L], both cut as their layout says.

    Args:
        sharding: Of the mesh.
        table: [V, D] floats, or a quantized or fake quantized embedding.
        ids: int32.
    """
    table = with_dequantized_scales(table)
    vocabulary_axes = sharding.vocabulary_axes(num_rows(table))

    def local(part: Any, ids: jax.Array) -> jax.Array:
        return lookup_in_shard(part, ids.reshape(-1), vocabulary_axes).reshape(*ids.shape, -1)

    rows = P(BATCH_AXES)
    return jax.shard_map(local, mesh=sharding.mesh, in_specs=(P(vocabulary_axes or None), rows), out_specs=rows)(table, ids)


def lookup_in_shard(part: Any, ids: jax.Array, vocabulary_axes: tuple[str, ...]) -> jax.Array:
    """Returns [T, D] rows for this device's ids [T], within a shard_map over the mesh.

    Each device looks up what it has of the rows that those it shares an embedding with ask for.

    Args:
        part: This device's rows of the embedding.
        ids: int32; along `model` all devices have the same.
        vocabulary_axes: The mesh axes that cut the embedding, the outer one first.
    """
    if not vocabulary_axes:
        return gather_lm_head_rows(part, ids)
    asked = lax.all_gather(ids, "fsdp", tiled=True) if "fsdp" in vocabulary_axes else ids
    index = asked - lax.axis_index(vocabulary_axes) * num_rows(part)
    is_here = (index >= 0) & (index < num_rows(part))
    rows = jnp.where(is_here[:, None], gather_lm_head_rows(part, jnp.where(is_here, index, 0)), 0)
    if "model" in vocabulary_axes:
        rows = lax.psum(rows, "model")
    return lax.psum_scatter(rows, "fsdp", tiled=True) if "fsdp" in vocabulary_axes else rows
