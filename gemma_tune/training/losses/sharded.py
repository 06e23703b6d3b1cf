"""The next-token loss on a mesh: tokens are cut along `data` and `fsdp`, the head's rows along `model` and `fsdp`.

Each device visits its part of the vocabulary for its tokens, and the parts are added up at the end, as Megatron-LM does
(arXiv:1909.08053, section 3). Rows that others along `fsdp` hold are gathered a block at a time, so that no device ever
has the whole head. The derivatives are written out as in `losses`, so nothing is differentiated through a collective.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gemma_tune.models.lm_head import LMHead, num_rows, slice_lm_head_rows, with_dequantized_scales
from gemma_tune.models.sharding.layers import lookup_in_shard
from gemma_tune.models.sharding.placement import BATCH_AXES, MeshSharding
from gemma_tune.quantization.codes import Quantized, dequantize, slice_rows
from gemma_tune.training.losses.cross_entropy import (
    VOCABULARY_BLOCK,
    LossSums,
    Running,
    both_gradients,
    gradient_in_hidden,
    sums_of,
    visit_blocks,
)
from gemma_tune.training.losses.target_positions import gather_targets

_BY_ROWS = P(BATCH_AXES)


class _Plan(NamedTuple):
    """What is known beforehand. vocabulary_axes: The mesh axes that cut the head's rows, the outer one first."""

    mesh: Mesh
    vocabulary_axes: tuple[str, ...]
    soft_cap: float | None
    block: int

    @property
    def head(self) -> P:
        """How the head is cut."""
        return P(self.vocabulary_axes or None)

    @property
    def num_peers(self) -> int:
        """Devices that gather their rows for each other."""
        return self.mesh.shape["fsdp"] if "fsdp" in self.vocabulary_axes else 1

    def local_block(self) -> int:
        """Rows of its own that a device reads at a time."""
        return max(1, self.block // self.num_peers)

    def run(self, function: Any, in_specs: Any, out_specs: Any, *arguments: Any) -> Any:
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
            *arguments
        )


def sharded_linear_cross_entropy(
    sharding: MeshSharding,
    hidden: jax.Array,
    head: LMHead,
    target_ids: jax.Array,
    weights: jax.Array,
    *,
    num_targets: int,
    soft_cap: float | None = None,
    head_is_trained: bool = False,
    block: int = VOCABULARY_BLOCK,
) -> LossSums:
    """Sums the loss as `losses.fused_linear_cross_entropy` does.

    Args:
        sharding: Of the mesh.
        hidden: [B, L, D] final hidden states.
        head: [V, D], of any kind.
        target_ids: [B, L] int32.
        weights: [B, L] float32; 0 drops a position.
        num_targets: Most positions with a weight in the rows of one device.
        soft_cap, head_is_trained, block: As there.
    """
    head = with_dequantized_scales(head)
    gather = jax.shard_map(
        functools.partial(gather_targets, num_targets=num_targets),
        mesh=sharding.mesh,
        in_specs=(_BY_ROWS,) * 3,
        out_specs=_BY_ROWS,
    )
    targets = gather(hidden, target_ids, weights.astype(jnp.float32))
    plan = _Plan(sharding.mesh, sharding.vocabulary_axes(num_rows(head)), soft_cap, block)
    loss = _trained_head_loss if head_is_trained else _frozen_head_loss
    loss_sum, correct_sum = loss(plan, targets.hidden, head, targets.target_ids, targets.weights)
    return LossSums(loss_sum, jnp.sum(weights, dtype=jnp.float32), lax.stop_gradient(correct_sum))


class _HeadPart(NamedTuple):
    """A device's rows of the head, and those that its peers along `fsdp` read at the same time."""

    plan: _Plan
    head: LMHead
    target_ids: jax.Array

    @property
    def num_rows(self) -> int:
        return num_rows(self.head)

    def rows(self, first: Any, count: int, dtype: Any) -> jax.Array:
        if self.plan.num_peers == 1:
            return slice_lm_head_rows(self.head, first, count, dtype)
        if isinstance(self.head, Quantized):  # Codes take less time on the way.
            codes = jax.tree.map(self._gather, slice_rows(self.head, first, count))
            return dequantize(codes, dtype)[..., 0]
        return self._gather(slice_lm_head_rows(self.head, first, count, dtype))

    def find(self, first: Any, count: int) -> tuple[jax.Array, jax.Array]:
        part, row = jnp.divmod(self.target_ids, self.num_rows)
        slice_of_model, peer = jnp.divmod(part, self.plan.num_peers)
        inside = (row >= first) & (row < first + count)
        if "model" in self.plan.vocabulary_axes:
            inside &= slice_of_model == lax.axis_index("model")
        return inside, peer * count + jnp.clip(row - first, 0, count - 1)

    @staticmethod
    def _gather(rows: jax.Array) -> jax.Array:
        return lax.all_gather(rows, "fsdp", tiled=True)


def _visit(plan: _Plan, hidden: Any, head: Any, target_ids: Any, with_gradient: bool) -> Running:
    """Returns what all parts of the vocabulary come to."""
    part = _HeadPart(plan, head, target_ids)
    running = visit_blocks(plan.soft_cap, plan.local_block(), hidden, part, with_gradient)
    if "model" not in plan.vocabulary_axes:
        return running
    is_here, _ = part.find(0, part.num_rows)
    top = lax.pmax(running.top, "model")
    shrink = jnp.exp(running.top - top)
    rows = running.weighted_rows
    return Running(
        top=top,
        total=lax.psum(running.total * shrink, "model"),
        target=lax.psum(running.target, "model"),
        target_slope=lax.psum(jnp.where(is_here, running.target_slope, 0), "model"),
        weighted_rows=None if rows is None else lax.psum(rows * shrink[:, None], "model"),
    )


def _sums(running: Running, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    loss_sum, correct_sum = sums_of(running, weights)
    return lax.psum(loss_sum, BATCH_AXES), lax.psum(correct_sum, BATCH_AXES)


def _in_specs(plan: _Plan) -> tuple:
    return _BY_ROWS, plan.head, _BY_ROWS, _BY_ROWS


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen_head_loss(plan: _Plan, hidden: Any, head: Any, target_ids: Any, weights: Any) -> tuple:
    def local(hidden: Any, head: Any, target_ids: Any, weights: Any) -> tuple:
        return _sums(_visit(plan, hidden, head, target_ids, with_gradient=False), weights)

    return plan.run(local, _in_specs(plan), (P(), P()), hidden, head, target_ids, weights)


def _frozen_head_forward(plan: _Plan, hidden: Any, head: Any, target_ids: Any, weights: Any) -> tuple:
    def local(hidden: Any, head: Any, target_ids: Any, weights: Any) -> tuple:
        running = _visit(plan, hidden, head, target_ids, with_gradient=True)
        gradient = gradient_in_hidden(running, lookup_in_shard(head, target_ids, plan.vocabulary_axes), weights)
        return *_sums(running, weights), gradient

    outputs = plan.run(local, _in_specs(plan), (P(), P(), _BY_ROWS), hidden, head, target_ids, weights)
    return outputs[:2], (outputs[2], jnp.empty(0, hidden.dtype))


def _frozen_head_backward(plan: _Plan, saved: tuple, cotangents: tuple) -> tuple:
    del plan
    gradient, like_hidden = saved
    return (gradient * cotangents[0]).astype(like_hidden.dtype), None, None, None


_frozen_head_loss.defvjp(_frozen_head_forward, _frozen_head_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _trained_head_loss(plan: _Plan, hidden: Any, head: Any, target_ids: Any, weights: Any) -> tuple:
    return _frozen_head_loss(plan, hidden, head, target_ids, weights)


def _trained_head_forward(plan: _Plan, hidden: Any, head: Any, target_ids: Any, weights: Any) -> tuple:
    def local(hidden: Any, head: Any, target_ids: Any, weights: Any) -> tuple:
        running = _visit(plan, hidden, head, target_ids, with_gradient=False)
        return *_sums(running, weights), running.top + jnp.log(running.total)

    outputs = plan.run(local, _in_specs(plan), (P(), P(), _BY_ROWS), hidden, head, target_ids, weights)
    return outputs[:2], (hidden, head, target_ids, weights, outputs[2])


def _trained_head_backward(plan: _Plan, saved: tuple, cotangents: tuple) -> tuple:
    hidden, head, target_ids, weights, log_total = saved

    def local(hidden: Any, head: Any, target_ids: Any, scale: Any, log_total: Any) -> tuple:
        (values,), tree = jax.tree.flatten(head)
        part = _HeadPart(plan, head, target_ids)

        def add_up(rows: jax.Array) -> jax.Array:
            rows = lax.psum_scatter(rows, "fsdp", tiled=True) if plan.num_peers > 1 else rows
            return lax.psum(rows, tuple(axis for axis in BATCH_AXES if axis not in plan.vocabulary_axes))

        of_hidden, of_head = both_gradients(
            plan.soft_cap, plan.local_block(), hidden, part, scale, log_total, values, add_up
        )
        if "model" in plan.vocabulary_axes:
            of_hidden = lax.psum(of_hidden, "model")
        return of_hidden.astype(hidden.dtype), jax.tree.unflatten(tree, [of_head])

    of_hidden, of_head = plan.run(
        local,
        (*_in_specs(plan), _BY_ROWS),
        (_BY_ROWS, plan.head),
        hidden,
        head,
        target_ids,
        weights * cotangents[0],
        log_total,
    )
    return of_hidden, of_head, None, None


_trained_head_loss.defvjp(_trained_head_forward, _trained_head_backward)
