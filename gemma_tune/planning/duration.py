"""How long a training step takes, from its operations, the bytes it moves, and what a chip can do.

A step computes, reads weights and activations, and, on a mesh, talks. Arithmetic and memory go on at the same time, so
the longer of the two counts; so does the gathering of weights and the summing of gradients beside them (ZeRO,
arXiv:1910.02054), as far as it is not longer than what it is hidden behind. The sums of a product that `model` cuts
(Megatron-LM, arXiv:1909.08053) are waited for.
"""

from typing import NamedTuple

from gemma_tune.config import Config
from gemma_tune.mesh import MeshShape
from gemma_tune.planning.abstract_train_state import AbstractTrainState
from gemma_tune.planning.hardware import Hardware
from gemma_tune.planning.sizes import Sizes, sizes_of
from gemma_tune.planning.step_memory import kept_width


class PlannedStep(NamedTuple):
    """One optimizer step; seconds of one device.

    operations: Of all devices. computing: At the rate that the hardware is assumed to reach. reading: Weights and
        activations. gathering: Talk that computing hides, as far as it is no longer. waiting: Talk that it doesn't.
        num_tokens: Positions that all devices get through.
    """

    operations: float
    computing: float
    reading: float
    gathering: float
    waiting: float
    num_tokens: int

    @property
    def seconds(self) -> float:
        """Returns how long the step takes."""
        return max(self.computing, self.reading, self.gathering) + self.waiting

    @property
    def bound_by(self) -> str:
        """Returns what most of the time is for."""
        busy = max((self.computing, "arithmetic"), (self.reading, "memory"), (self.gathering, "connection"))
        return "connection" if self.waiting > busy[0] else busy[1]


def planned_step(run: AbstractTrainState, hardware: Hardware) -> PlannedStep:
    """Returns how long a run's step takes on a mesh of such chips."""
    config, sizes = run.config, sizes_of(run)
    shape = run.sharding.shape if run.sharding else MeshShape()
    rate = hardware.flops_32 if sizes.item_bytes == 4 else hardware.flops_16
    operations = step_operations(sizes, config, shape) * sizes.num_micro_batches
    micro = sizes.num_micro_batches
    return PlannedStep(
        operations=operations * shape.num_row_shards,
        computing=operations / shape.model / (rate * hardware.share),
        reading=(micro * _read_bytes(sizes, config, shape) + _update_bytes(sizes)) / hardware.memory_bandwidth,
        gathering=_gathered_bytes(sizes, config, shape) / hardware.link_bandwidth,
        waiting=micro * _summed_bytes(sizes, config, shape) / hardware.link_bandwidth,
        num_tokens=config.training.batch_size * config.row_length,
    )


def step_operations(sizes: Sizes, config: Config, shape: MeshShape) -> float:
    """Returns the additions and multiplications of the rows of one micro-batch that are on a device, `model` uncut.

    A product of weights takes two for each weight and token forward, two for the gradient in its inputs, and two for
    that in the weights where they are trained; forward twice where `remat` computes it anew. A query sees half of a
    row's keys.
    """
    is_full = config.training.method == "full"
    again = kept_width(sizes, config) == sizes.width
    of_weights = 2.0 * sizes.block_params * (2 + is_full + again)
    forward = 4.0 * sizes.num_heads * shape.model * _head_width(sizes) * sizes.row_length / 2  # Scores and their sums.
    of_attention = sizes.num_layers * forward * (1 + 1 + 2)  # Forward, anew, and twice as much backward.
    # The loss makes a frozen head's gradient along the way; a trained head's logits twice.
    of_head = 2.0 * sizes.embedding_params * (4 if is_full else 2)
    return sizes.num_tokens * (of_weights + of_attention) + sizes.num_targets * of_head


def _head_width(sizes: Sizes) -> float:
    return sizes.query / sizes.num_heads


def _read_bytes(sizes: Sizes, config: Config, shape: MeshShape) -> float:
    """Weights forward and backward, and activations: written once, read twice."""
    passes = 2 + (kept_width(sizes, config) == sizes.width)
    weights = sizes.num_layers * sizes.block_bytes + sizes.embedding_bytes
    activations = 3.0 * sizes.num_layers * sizes.num_tokens * sizes.item_bytes
    return passes * weights + activations * (8 * sizes.width + sizes.query + 2 * sizes.key + 3 * sizes.feed_forward)


def _update_bytes(sizes: Sizes) -> float:
    return 7.0 * 4 * sizes.trained_params  # Weight and two moments, read and written, and the gradient.


def _gathered_bytes(sizes: Sizes, config: Config, shape: MeshShape) -> float:
    """What a device sends: gathered weights for each pass, parts of gradients, and sums over copies once a step."""
    passes = 2 + (kept_width(sizes, config) == sizes.width)
    others = (shape.fsdp - 1) / shape.fsdp
    weights = passes * sizes.num_layers * sizes.block_bytes * others * sizes.num_micro_batches
    gradients = 4.0 * sizes.trained_params
    return weights + 2 * gradients * ((shape.data - 1) / shape.data + others)


def _summed_bytes(sizes: Sizes, config: Config, shape: MeshShape) -> float:
    """Sums of hidden states behind attention and feed-forward layer, forward and backward."""
    sums = 4 + 2 * (kept_width(sizes, config) == sizes.width)
    hidden = sizes.num_tokens * sizes.width * sizes.item_bytes
    return 2.0 * (shape.model - 1) / shape.model * sums * sizes.num_layers * hidden
