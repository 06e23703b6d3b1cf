"""Predicts the memory of a training step on each device from the model's sizes.

Weights, optimizer state and the batch are counted exactly, from the shapes of the step's arguments. Temporary memory is
that of the larger of two moments:

* The backward pass begins, in the last decoder block. All other blocks hold what `remat` saves (models/remat.py). This
  block holds all that its gradients need, and its weights, gathered where `fsdp` shards them. The gradients that exist
  by then are that of the embedding, if it is trained, and, with several micro-batches, the accumulated ones.
* The optimizer has all gradients, and the embedding's two gradients, from the LM head and from the lookup, are being
  added.

The number of values that a block's gradients need was fitted to compiled programs of two to six blocks, in which one
width at a time was doubled. `python -m benchmarks.plan` compares the predictions with compiled steps.
"""

from typing import NamedTuple

import jax

from gemma_tune.config import Config
from gemma_tune.mesh import MeshShape
from gemma_tune.planning.abstract_train_state import AbstractTrainState, bytes_per_device
from gemma_tune.planning.device_sizes import DeviceSizes, device_sizes

# As in training/losses/cross_entropy.py: a tile of logits, its exponentials, and one array more for a soft cap.
_LOGIT_ARRAYS, _VOCABULARY_TILE = 3, 4096


class PlannedMemory(NamedTuple):
    """The predicted memory of a training step on each device, in bytes.

    Attributes:
        weights: Bytes of the weights and of a batch.
        optimizer_state: Bytes of the optimizer state.
        activations: Bytes of the activations that all decoder blocks save for the backward pass.
        gradients: Bytes of the gradients that are held at the moment of the largest use.
        workspace: Bytes of all else at that moment: one block's intermediate values, gathered weights, logits.
    """

    weights: float
    optimizer_state: float
    activations: float
    gradients: float
    workspace: float

    @property
    def total(self) -> float:
        """Returns the sum of all parts."""
        return sum(self)


def planned_memory(run: AbstractTrainState) -> PlannedMemory:
    """Returns the predicted memory of a run's training step."""
    config, sizes = run.config, device_sizes(run)
    shape = run.sharding.shape if run.sharding else MeshShape()
    token_bytes = sizes.num_tokens * sizes.item_bytes
    optimizer_state = float(sum(map(bytes_per_device, jax.tree.leaves(run.state.opt_state))))
    weights = run.argument_bytes - optimizer_state
    activations = sizes.num_layers * saved_width(sizes, config) * token_bytes
    workspace = max(workspace_width(sizes, config) * token_bytes, _lm_head_bytes(sizes))
    if shape.fsdp > 1:
        workspace += sizes.block_bytes
    # The gradient of the LM head; on a mesh, where that of the lookup is sharded alike, that one too.
    num_embeddings = (2 if shape.num_devices > 1 else 1) if config.training.method == "full" else 0
    embedding = num_embeddings * 4.0 * sizes.embedding_params * sizes.embedding_part
    gradients = 4.0 * sizes.trained_params
    backward = PlannedMemory(
        weights,
        optimizer_state,
        activations,
        embedding + (gradients if sizes.num_micro_batches > 1 else 0.0),
        workspace,
    )
    update = PlannedMemory(weights, optimizer_state, 0.0, gradients, embedding)
    return max(backward, update, key=lambda memory: memory.total)


def saved_width(sizes: DeviceSizes, config: Config) -> float:
    """Returns how many numbers per token a decoder block saves for the backward pass.

    `full` saves the block's input. `dots` also saves the products with weights: queries, keys, values, the outputs of
    attention and of the feed-forward layer, and the two products before the gate. Quantized products are recomputed,
    since their backward pass is written out (models/quantized/layers.py).
    """
    if config.training.remat == "none":
        return needed_width(sizes)
    if config.training.remat == "full" or config.quant_spec is not None:
        return sizes.width
    products = 2 * sizes.width + sizes.query + 2 * sizes.key + 2 * sizes.feed_forward
    return sizes.width + products + sizes.lora_width


def workspace_width(sizes: DeviceSizes, config: Config) -> float:
    """Returns how many numbers per token the backward pass of one block holds in addition to the saved ones."""
    if config.training.remat == "none":
        return 0.2 * needed_width(sizes)
    if saved_width(sizes, config) == sizes.width:
        return 1.1 * needed_width(sizes)
    return 1.04 * needed_width(sizes) - saved_width(sizes, config) + sizes.width


def needed_width(sizes: DeviceSizes) -> float:
    """Returns how many numbers per token the gradients of one block need when nothing is recomputed."""
    width = 3 * sizes.num_norms + 3
    feed_forward = 7.0
    if not sizes.trains_feed_forward:  # Frozen products don't need their inputs.
        width, feed_forward = width - 4, feed_forward - 4
    attention = 6.5 * sizes.query + 6.8 * sizes.key + 1.1 * sizes.num_heads * sizes.row_length
    return 0.8 * (width * sizes.width + feed_forward * sizes.feed_forward + attention) + 2 * sizes.lora_width


def _lm_head_bytes(sizes: DeviceSizes) -> float:
    """Returns the bytes that the loss holds: a tile of logits, and hidden states and their gradients."""
    return 4.0 * sizes.num_targets * (_LOGIT_ARRAYS * _VOCABULARY_TILE + 3 * sizes.width)
