"""Shapes of Gemmas, the arithmetic of training them, and examples of random tokens. Imports no Keras."""

from typing import NamedTuple

import numpy as np

from benchmarks.jobs import Job
from gemma_tune.data import TokenizedExample

RANDOM = "random:"  # random:SHAPE:PRECISION is a model of random weights; see `parse_random`.
_SHORTEST, _LONGEST = 88, 513  # Tokens of a random example: 300 on average.
_PROMPT_TOKENS = 30  # Of each example, without a loss; as much as in a docstring's question.


class Shape(NamedTuple):
    """A Gemma's sizes. `family` as in gemma_tune; `feed_forward` is the width between the two products."""

    family: str
    vocabulary: int
    layers: int
    heads: int
    kv_heads: int
    width: int
    feed_forward: int
    head_width: int
    window: int

    @property
    def linear_parameters(self) -> int:
        """Entries of all kernels in the decoder blocks."""
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.feed_forward)

    def least_operations(self, num_tokens: int, num_targets: int) -> float:
        """Returns the floating-point operations that training LoRA factors can't do without.

        Forward and the gradient of the activations through every frozen kernel, 4 a parameter and token; the same for
        the head, at target positions alone. Attention and LoRA's factors are left out, as are gradients of frozen
        kernels.
        """
        return 4.0 * (self.linear_parameters * num_tokens + self.vocabulary * self.width * num_targets)


SHAPES = {
    "gemma3_270m": Shape("gemma3", 262_144, 18, 4, 1, 640, 2048, 256, 512),
    "gemma3_1b": Shape("gemma3", 262_144, 26, 4, 1, 1152, 6912, 256, 512),
    "gemma3_4b": Shape("gemma3", 262_144, 34, 8, 4, 2560, 10_240, 256, 1024),
    "gemma2_2b": Shape("gemma2", 256_000, 26, 8, 4, 2304, 9216, 256, 4096),
    "tiny": Shape("gemma3", 1024, 2, 4, 1, 64, 128, 16, 16),
}


def parse_random(source: str) -> tuple[Shape, str] | None:
    """Returns shape and precision of `random:SHAPE:PRECISION`, or None for another source."""
    if not source.startswith(RANDOM):
        return None
    name, precision = source.removeprefix(RANDOM).split(":")
    return SHAPES[name], precision


def random_job(num_examples: int, vocabulary: int) -> Job:
    """Returns examples of random tokens, as long as the documents of `jobs`."""
    rng = np.random.default_rng(0)
    lengths = rng.permutation(np.linspace(_SHORTEST, _LONGEST, num_examples).astype(int))
    examples = [
        TokenizedExample(rng.integers(10, vocabulary, n).astype(np.int32), np.arange(n) >= _PROMPT_TOKENS)
        for n in lengths
    ]
    return Job(examples, row_length=1024, fixed_length=512, peer_batch_size=1)
