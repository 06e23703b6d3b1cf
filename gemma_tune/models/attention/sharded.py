"""Attention kernels on a mesh. XLA can't cut a kernel that it doesn't know, so each device runs it on its rows and
heads.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gemma_tune.models.sharding.placement import BATCH_AXES, MeshSharding

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def shard_map_attention(
    sharding: MeshSharding, kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """Runs a kernel on each device's rows and heads.

    Heads are cut along `model`, if it divides them; key/value heads too, after they were repeated if there are not
    enough.

    Args:
        sharding: Of the mesh.
        kernel: q, k, v, mask -> [B, T, N, H], for any number of rows and heads.
        q: [B, T, N, H].
        k, v: [B, T, K, H].
        mask: [B, …].
    """
    parts = sharding.shape.model
    is_cut = q.shape[2] % parts == 0
    if is_cut and k.shape[2] % parts:
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    heads = P(BATCH_AXES, None, "model" if is_cut else None)
    local = jax.shard_map(
        kernel, mesh=sharding.mesh, in_specs=(heads, heads, heads, P(BATCH_AXES)), out_specs=heads, check_vma=False
    )
    return local(q, k, v, mask)
