"""What a training step takes on each device, from sizes alone.

Weights, optimizer state and the batch are counted exactly, from the shapes that the step is called with. What is held
while computing follows two moments, of which the larger counts:

* the backward pass has come to the last block: of all others is kept what `remat` says (models/remat.py), of this one
  everything that its gradients need, with its weights gathered where `fsdp` cuts them, and the gradients there are: of
  the embedding, if that is trained, and, with several micro-batches, the sums of all;
* the optimizer has all gradients, and the embedding's two parts, of the head and of the lookup, are being added.

What a block needs for its gradients was counted in compiled programs of two to six blocks with one width at a time
doubled.
`python -m benchmarks.plan` holds the predictions against compiled steps.
"""

from typing import NamedTuple

import jax

from gemma_tune.config import Config
from gemma_tune.mesh import MeshShape
from gemma_tune.planning.abstract_train_state import AbstractTrainState, device_bytes
from gemma_tune.planning.sizes import Sizes, sizes_of

_LOGIT_ARRAYS, _VOCABULARY_BLOCK = (
    3,
    4096,
)  # training/losses/cross_entropy.py: logits, exponentials, and what a soft cap needs.


class PlannedMemory(NamedTuple):
    """Bytes on each device.

    weights: And the batch. optimizer: Its state. kept: Activations of all blocks for the backward pass. gradients: What
        of them is held at the largest moment. working: The rest of it: one block's gradients, gathered weights, logits.
    """

    weights: float
    optimizer: float
    kept: float
    gradients: float
    working: float

    @property
    def total(self) -> float:
        """Returns all of it."""
        return sum(self)


def planned_memory(run: AbstractTrainState) -> PlannedMemory:
    """Returns what a run's step takes on each device."""
    config, sizes = run.config, sizes_of(run)
    shape = run.sharding.shape if run.sharding else MeshShape()
    token_bytes = sizes.num_tokens * sizes.item_bytes
    optimizer = float(sum(map(device_bytes, jax.tree.leaves(run.state.opt_state))))
    weights = run.argument_bytes - optimizer
    kept = sizes.num_layers * kept_width(sizes, config) * token_bytes
    working = max(working_width(sizes, config) * token_bytes, _head_bytes(sizes))
    if shape.fsdp > 1:
        working += sizes.block_bytes
    # Its gradient of the head; on a mesh, where the lookup's is cut like it, that of the lookup too.
    num_embeddings = (2 if shape.num_devices > 1 else 1) if config.training.method == "full" else 0
    embedding = num_embeddings * 4.0 * sizes.embedding_params * sizes.embedding_part
    gradients = 4.0 * sizes.trained_params
    backward = PlannedMemory(
        weights, optimizer, kept, embedding + (gradients if sizes.num_micro_batches > 1 else 0.0), working
    )
    update = PlannedMemory(weights, optimizer, 0.0, gradients, embedding)
    return max(backward, update, key=lambda memory: memory.total)


def kept_width(sizes: Sizes, config: Config) -> float:
    """Returns how many numbers a token a block keeps for its backward pass.

    `full` keeps the block's input. `dots` keeps the results of products with weights too: queries, keys, values, what
    attention and feed-forward layer give back, and the two products of the gate. A quantized product is computed anew:
    its backward pass is written out (models/quantized/layers.py).
    """
    if config.training.remat == "none":
        return needed_width(sizes)
    if config.training.remat == "full" or config.quant_spec is not None:
        return sizes.width
    products = 2 * sizes.width + sizes.query + 2 * sizes.key + 2 * sizes.feed_forward
    return sizes.width + products + sizes.inner


def working_width(sizes: Sizes, config: Config) -> float:
    """Returns how many numbers a token the backward pass of one block holds beyond what it kept."""
    if config.training.remat == "none":
        return 0.2 * needed_width(sizes)
    if kept_width(sizes, config) == sizes.width:
        return 1.1 * needed_width(sizes)
    return 1.04 * needed_width(sizes) - kept_width(sizes, config) + sizes.width


def needed_width(sizes: Sizes) -> float:
    """Returns how many numbers a token the gradients of one block need, when nothing is computed anew."""
    width = 3 * sizes.num_norms + 3
    feed_forward = 7.0
    if not sizes.trains_feed_forward:  # The inputs of frozen products are not needed.
        width, feed_forward = width - 4, feed_forward - 4
    attention = 6.5 * sizes.query + 6.8 * sizes.key + 1.1 * sizes.num_heads * sizes.row_length
    return 0.8 * (width * sizes.width + feed_forward * sizes.feed_forward + attention) + 2 * sizes.inner


def _head_bytes(sizes: Sizes) -> float:
    """Returns what the loss holds: blocks of logits, and hidden states with their gradient, of the positions scored."""
    return 4.0 * sizes.num_targets * (_LOGIT_ARRAYS * _VOCABULARY_BLOCK + 3 * sizes.width)
