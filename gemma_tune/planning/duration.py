"""Predicts the duration of a training step from its FLOPs, its memory traffic and the chip's published rates.

A step computes, reads weights and activations, and, on a mesh, communicates. Arithmetic, memory traffic and part of the
communication overlap, so that the longest of the three counts. Communication that overlaps is the all-gather of weights
and the reduction of gradients (ZeRO, arXiv:1910.02054). Communication that doesn't is the all-reduce behind each
product that the `model` axis shards (Megatron-LM, arXiv:1909.08053); its time is added.
"""

from typing import NamedTuple

from gemma_tune.config import Config
from gemma_tune.mesh import MeshShape
from gemma_tune.planning.abstract_train_state import AbstractTrainState
from gemma_tune.planning.device_sizes import DeviceSizes, device_sizes
from gemma_tune.planning.hardware import Hardware
from gemma_tune.planning.step_memory import saved_width


class PlannedStep(NamedTuple):
    """The predicted duration of one optimizer step.

    Attributes:
        flops: Floating-point operations of all devices together.
        compute_seconds: Time for the arithmetic, at the utilization that the hardware is assumed to reach.
        memory_seconds: Time for reading and writing weights and activations.
        overlapped_seconds: Time for the communication that overlaps with the arithmetic.
        exposed_seconds: Time for the communication that doesn't overlap.
        num_tokens: Number of positions in a batch, on all devices together.
    """

    flops: float
    compute_seconds: float
    memory_seconds: float
    overlapped_seconds: float
    exposed_seconds: float
    num_tokens: int

    @property
    def seconds(self) -> float:
        """Returns the duration of the step."""
        return max(self.compute_seconds, self.memory_seconds, self.overlapped_seconds) + self.exposed_seconds

    @property
    def bound_by(self) -> str:
        """Returns what limits the speed: `arithmetic`, `memory` or `connection`."""
        seconds, bound = max(
            (self.compute_seconds, "arithmetic"),
            (self.memory_seconds, "memory"),
            (self.overlapped_seconds, "connection"),
        )
        return "connection" if self.exposed_seconds > seconds else bound


def planned_step(run: AbstractTrainState, hardware: Hardware) -> PlannedStep:
    """Returns the predicted duration of a run's training step on a mesh of such chips."""
    config, sizes = run.config, device_sizes(run)
    shape = run.sharding.shape if run.sharding else MeshShape()
    rate = hardware.flops_32 if sizes.item_bytes == 4 else hardware.flops_16
    flops = step_flops(sizes, config, shape) * sizes.num_micro_batches
    micro = sizes.num_micro_batches
    return PlannedStep(
        flops=flops * shape.num_row_shards,
        compute_seconds=flops / shape.model / (rate * hardware.mfu),
        memory_seconds=(micro * _read_bytes(sizes, config, shape) + _update_bytes(sizes)) / hardware.memory_bandwidth,
        overlapped_seconds=_gathered_bytes(sizes, config, shape) / hardware.link_bandwidth,
        exposed_seconds=micro * _summed_bytes(sizes, config, shape) / hardware.link_bandwidth,
        num_tokens=config.training.batch_size * config.row_length,
    )


def step_flops(sizes: DeviceSizes, config: Config, shape: MeshShape) -> float:
    """Returns the FLOPs of a device's rows of one micro-batch, as if the `model` axis had one part.

    For each weight and token, a product takes two operations forward, two for the gradient of its inputs, and two for
    that of the weights where they are trained. The forward pass counts twice where `remat` recomputes it. On average, a
    query attends to half of its row's keys.
    """
    is_full = config.training.method == "full"
    recomputes = saved_width(sizes, config) == sizes.width
    weight_flops = 2.0 * sizes.block_params * (2 + is_full + recomputes)
    forward = 4.0 * sizes.num_heads * shape.model * _head_width(sizes) * sizes.row_length / 2  # Scores, then values.
    attention_flops = sizes.num_layers * forward * (1 + 1 + 2)  # Forward, recomputed, and twice as much backward.
    # With a frozen LM head, the loss makes its gradient in the forward pass. With a trained one, logits are made twice.
    lm_head_flops = 2.0 * sizes.embedding_params * (4 if is_full else 2)
    return sizes.num_tokens * (weight_flops + attention_flops) + sizes.num_targets * lm_head_flops


def _head_width(sizes: DeviceSizes) -> float:
    return sizes.query / sizes.num_heads


def _read_bytes(sizes: DeviceSizes, config: Config, shape: MeshShape) -> float:
    """Returns the bytes that a micro-batch moves: weights, read in each pass, and activations, written once and read
    twice.
    """
    passes = 2 + (saved_width(sizes, config) == sizes.width)
    weights = sizes.num_layers * sizes.block_bytes + sizes.embedding_bytes
    activations = 3.0 * sizes.num_layers * sizes.num_tokens * sizes.item_bytes
    return passes * weights + activations * (8 * sizes.width + sizes.query + 2 * sizes.key + 3 * sizes.feed_forward)


def _update_bytes(sizes: DeviceSizes) -> float:
    return 7.0 * 4 * sizes.trained_params  # The weight and two moments, read and written, and the gradient.


def _gathered_bytes(sizes: DeviceSizes, config: Config, shape: MeshShape) -> float:
    """Returns the bytes that a device sends: gathered weights in each pass, and reduced gradients once a step."""
    passes = 2 + (saved_width(sizes, config) == sizes.width)
    others = (shape.fsdp - 1) / shape.fsdp
    weights = passes * sizes.num_layers * sizes.block_bytes * others * sizes.num_micro_batches
    gradients = 4.0 * sizes.trained_params
    return weights + 2 * gradients * ((shape.data - 1) / shape.data + others)


def _summed_bytes(sizes: DeviceSizes, config: Config, shape: MeshShape) -> float:
    """Returns the bytes that a device sends in the all-reduces behind attention and feed-forward layers."""
    sums = 4 + 2 * (saved_width(sizes, config) == sizes.width)
    hidden = sizes.num_tokens * sizes.width * sizes.item_bytes
    return 2.0 * (shape.model - 1) / shape.model * sums * sizes.num_layers * hidden
