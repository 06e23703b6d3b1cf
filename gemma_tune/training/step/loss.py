"""The loss of a batch as a pure function of a model's parameters."""

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gemma_tune.data import Batch
from gemma_tune.models.functional import Params, final_soft_cap, hidden_states, lm_head_weights, params_scope
from gemma_tune.models.sharding.layers import batch_sharded_inputs
from gemma_tune.models.sharding.placement import MeshSharding
from gemma_tune.runtime.backend import keras
from gemma_tune.training.losses.cross_entropy import LossSums, fused_linear_cross_entropy
from gemma_tune.training.losses.sharded import sharded_linear_cross_entropy
from gemma_tune.training.losses.target_positions import gather_targets
from gemma_tune.training.step.per_block import LossOfHidden


def make_loss_fn(
    model: keras.Model, num_targets: int, sharding: MeshSharding | None = None
) -> Callable[[Params, Params, Batch], LossSums]:
    """Returns (trainable, frozen, batch) -> LossSums of one micro-batch.

    Args:
        model: A CausalLM; its variables are not changed.
        num_targets: Most positions with a loss in any batch; on a mesh, in the rows of one device. Only these reach
            the LM head.
        sharding: Mesh sharding of the model, or None.
    """
    backbone, loss_of_hidden = model.backbone, make_loss_of_hidden(model, num_targets, sharding)

    def loss_fn(trainable: Params, frozen: Params, batch: Batch) -> LossSums:
        with params_scope(model, trainable, frozen), batch_sharded_inputs() if sharding else contextlib.nullcontext():
            hidden = hidden_states(backbone, batch.token_ids, batch.segment_ids, batch.positions)
            return loss_of_hidden(trainable, frozen, hidden, batch)

    return loss_fn


def make_loss_of_hidden(model: keras.Model, num_targets: int, sharding: MeshSharding | None = None) -> LossOfHidden:
    """Returns (trainable, frozen, [B, L, D] final hidden states, batch) -> LossSums.

    It has to be called within `params_scope`. Arguments as in `make_loss_fn`.
    """
    backbone = model.backbone
    embedding_path = backbone.token_embedding.path
    soft_cap = final_soft_cap(backbone)

    def loss_of_hidden(trainable: Params, frozen: Params, hidden: jax.Array, batch: Batch) -> LossSums:
        head_is_trained = any(path.startswith(embedding_path) for path in trainable)
        if sharding:
            return sharded_linear_cross_entropy(
                sharding,
                hidden,
                lm_head_weights(backbone),
                jnp.asarray(batch.target_ids),
                jnp.asarray(batch.loss_weights),
                num_targets=num_targets,
                soft_cap=soft_cap,
                head_is_trained=head_is_trained,
            )
        targets = gather_targets(hidden, batch.target_ids, batch.loss_weights, num_targets)
        return fused_linear_cross_entropy(
            targets.hidden,
            lm_head_weights(backbone),
            targets.target_ids,
            targets.weights,
            soft_cap=soft_cap,
            head_is_trained=head_is_trained,
        )

    return loss_of_hidden
