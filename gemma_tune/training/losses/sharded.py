"""The next-token loss on a mesh: tokens are cut along `data` and `fsdp`, the head's rows along `model` and `fsdp`.

Each device reads its part of the vocabulary for its tokens, and the partial sums are added up at the end, as in
Megatron-LM (arXiv:1909.08053, section 3). Rows that other devices along `fsdp` hold are gathered tile by tile, so that
no device ever has the whole head. The derivatives are written out as in `cross_entropy`, so that nothing is
differentiated through a collective.
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
from gemma_tune.training.losses.cross_entropy import LossSums, TargetScores
from gemma_tune.training.losses.target_positions import gather_targets
from gemma_tune.training.losses.vocabulary_tiles import (
    VOCABULARY_TILE,
    Running,
    backward_pass,
    forward_pass,
    gradient_in_hidden,
    target_losses,
    weighted_sums,
)

_BY_ROWS = P(BATCH_AXES)


class _Plan(NamedTuple):
    """The static settings of a loss.

    Attributes:
        mesh: Mesh of devices.
        vocabulary_axes: Mesh axes that the head's rows are cut along, the outer one first.
        soft_cap: Soft cap of the logits, or None.
        tile: Rows of the head in a tile, on all devices that gather them for each other.
    """

    mesh: Mesh
    vocabulary_axes: tuple[str, ...]
    soft_cap: float | None
    tile: int

    @property
    def head_spec(self) -> P:
        """Partition spec of the head."""
        return P(self.vocabulary_axes or None)

    @property
    def num_peers(self) -> int:
        """Number of devices that gather their rows for each other."""
        return self.mesh.shape["fsdp"] if "fsdp" in self.vocabulary_axes else 1

    @property
    def local_tile(self) -> int:
        """Rows of its own that a device contributes to a tile."""
        return max(1, self.tile // self.num_peers)

    def shard_map(self, function: Any, in_specs: Any, out_specs: Any, *arguments: Any) -> Any:
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
    tile: int = VOCABULARY_TILE,
) -> LossSums:
    """Sums the loss on a mesh, as `fused_linear_cross_entropy` does on one device.

    Args:
        sharding: Mesh sharding of the model.
        hidden: [B, L, D] final hidden states.
        head: [V, D] tied embedding, of any kind.
        target_ids: [B, L] int32.
        weights: [B, L] float32; 0 drops a position.
        num_targets: Most positions with a loss in the rows of one device.
        soft_cap, head_is_trained, tile: As in `fused_linear_cross_entropy`.
    """
    head = with_dequantized_scales(head)
    gather = jax.shard_map(
        functools.partial(gather_targets, num_targets=num_targets),
        mesh=sharding.mesh,
        in_specs=(_BY_ROWS,) * 3,
        out_specs=_BY_ROWS,
    )
    targets = gather(hidden, target_ids, weights.astype(jnp.float32))
    plan = _Plan(sharding.mesh, sharding.vocabulary_axes(num_rows(head)), soft_cap, tile)
    loss = _trained_head_loss if head_is_trained else _frozen_head_loss
    loss_sum, correct_sum = loss(plan, targets.hidden, head, targets.target_ids, targets.weights)
    return LossSums(loss_sum, jnp.sum(weights, dtype=jnp.float32), lax.stop_gradient(correct_sum))


def sharded_target_scores(
    sharding: MeshSharding,
    hidden: jax.Array,
    head: LMHead,
    places: jax.Array,
    target_ids: jax.Array,
    *,
    soft_cap: float | None = None,
    tile: int = VOCABULARY_TILE,
) -> TargetScores:
    """Returns the score of each target on a mesh, as `linear_target_scores` does on one device.

    Args:
        sharding: Mesh sharding of the model.
        hidden: [B, L, D] final hidden states.
        head: [V, D] tied embedding, of any kind.
        places: [P, T] int32 positions of the targets, for each of the P parts of the rows: row · L + position, with
            rows counted from the first of the part.
        target_ids: [P, T] int32.
        soft_cap, tile: As in `fused_linear_cross_entropy`.

    Returns:
        TargetScores, [P, T].
    """
    head = with_dequantized_scales(head)
    plan = _Plan(sharding.mesh, sharding.vocabulary_axes(num_rows(head)), soft_cap, tile)

    def local(hidden: Any, head: Any, places: Any, target_ids: Any) -> tuple[jax.Array, jax.Array]:
        of_targets = hidden.reshape(-1, hidden.shape[-1])[places[0]]
        losses, is_likeliest = target_losses(_forward_pass(plan, of_targets, head, target_ids[0], with_gradient=False))
        return -losses[None], is_likeliest[None]

    in_specs = (_BY_ROWS, plan.head_spec, _BY_ROWS, _BY_ROWS)
    return TargetScores(*plan.shard_map(local, in_specs, (_BY_ROWS, _BY_ROWS), hidden, head, places, target_ids))


class _HeadPart(NamedTuple):
    """A `Vocabulary` of a device's rows of the head, and of those that its peers along `fsdp` read at the same time."""

    plan: _Plan
    head: LMHead
    target_ids: jax.Array

    @property
    def num_rows(self) -> int:
        return num_rows(self.head)

    def rows(self, first: Any, count: int, dtype: Any) -> jax.Array:
        if self.plan.num_peers == 1:
            return slice_lm_head_rows(self.head, first, count, dtype)
        if isinstance(self.head, Quantized):  # Codes are faster to transfer than floats.
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


def _forward_pass(plan: _Plan, hidden: Any, head: Any, target_ids: Any, with_gradient: bool) -> Running:
    """Returns the sums over all parts of the vocabulary."""
    part = _HeadPart(plan, head, target_ids)
    running = forward_pass(plan.soft_cap, plan.local_tile, hidden, part, with_gradient)
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
    loss_sum, correct_sum = weighted_sums(running, weights)
    return lax.psum(loss_sum, BATCH_AXES), lax.psum(correct_sum, BATCH_AXES)


def _in_specs(plan: _Plan) -> tuple:
    return _BY_ROWS, plan.head_spec, _BY_ROWS, _BY_ROWS


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen_head_loss(plan: _Plan, hidden: Any, head: Any, target_ids: Any, weights: Any) -> tuple:
    def local(hidden: Any, head: Any, target_ids: Any, weights: Any) -> tuple:
        return _sums(_forward_pass(plan, hidden, head, target_ids, with_gradient=False), weights)

    return plan.shard_map(local, _in_specs(plan), (P(), P()), hidden, head, target_ids, weights)


def _frozen_head_forward(plan: _Plan, hidden: Any, head: Any, target_ids: Any, weights: Any) -> tuple:
    def local(hidden: Any, head: Any, target_ids: Any, weights: Any) -> tuple:
        running = _forward_pass(plan, hidden, head, target_ids, with_gradient=True)
        gradient = gradient_in_hidden(running, lookup_in_shard(head, target_ids, plan.vocabulary_axes), weights)
        return *_sums(running, weights), gradient

    outputs = plan.shard_map(local, _in_specs(plan), (P(), P(), _BY_ROWS), hidden, head, target_ids, weights)
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
        running = _forward_pass(plan, hidden, head, target_ids, with_gradient=False)
        return *_sums(running, weights), running.top + jnp.log(running.total)

    outputs = plan.shard_map(local, _in_specs(plan), (P(), P(), _BY_ROWS), hidden, head, target_ids, weights)
    return outputs[:2], (hidden, head, target_ids, weights, outputs[2])


def _trained_head_backward(plan: _Plan, saved: tuple, cotangents: tuple) -> tuple:
    hidden, head, target_ids, weights, log_total = saved

    def local(hidden: Any, head: Any, target_ids: Any, scale: Any, log_total: Any) -> tuple:
        (values,), tree = jax.tree.flatten(head)
        part = _HeadPart(plan, head, target_ids)

        def add_up(rows: jax.Array) -> jax.Array:
            rows = lax.psum_scatter(rows, "fsdp", tiled=True) if plan.num_peers > 1 else rows
            return lax.psum(rows, tuple(axis for axis in BATCH_AXES if axis not in plan.vocabulary_axes))

        hidden_gradient, head_gradient = backward_pass(
            plan.soft_cap, plan.local_tile, hidden, part, scale, log_total, values, add_up
        )
        if "model" in plan.vocabulary_axes:
            hidden_gradient = lax.psum(hidden_gradient, "model")
        return hidden_gradient.astype(hidden.dtype), jax.tree.unflatten(tree, [head_gradient])

    hidden_gradient, head_gradient = plan.shard_map(
        local,
        (*_in_specs(plan), _BY_ROWS),
        (_BY_ROWS, plan.head_spec),
        hidden,
        head,
        target_ids,
        weights * cotangents[0],
        log_total,
    )
    return hidden_gradient, head_gradient, None, None


_trained_head_loss.defvjp(_trained_head_forward, _trained_head_backward)
