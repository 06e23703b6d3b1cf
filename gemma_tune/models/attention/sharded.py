"""Runs attention kernels on a mesh.

XLA can't partition a kernel that isn't its own, so each device runs the kernel on its rows and heads.
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
    """Runs an attention kernel by `jax.shard_map`, on each device's rows and heads.

    Query heads are cut along the mesh axis `model` if it divides them. Key/value heads are cut with them, and repeated
    before that if there are too few.

    Args:
        sharding: Mesh sharding of the model.
        kernel: (q, k, v, mask) -> [B, T, N, H], for any number of rows and heads.
        q: [B, T, N, H] queries.
        k, v: [B, T, K, H] keys and values.
        mask: [B, …] array that the kernel takes as its mask.

    Returns:
        [B, T, N, H] outputs.
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
