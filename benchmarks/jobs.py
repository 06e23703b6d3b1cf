"""What the benchmarks train on: text that every machine with this package has.

documents: docstrings of the installed scientific packages, asked for by their functions' names; about 300 tokens on
    average, cut at 512.
chats: questions to the shipped support desk and the first sentences of their answers; about 40 tokens.

A few examples stand for all there are: they are taken at even steps through all of them, sorted by length, so that
their mean length is that of all. Their order is random.
"""

import importlib
import inspect
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from gemma_tune.data import Example, TokenizedExample, Turn, load_examples, template_for
from gemma_tune.data.tokenize import tokenize_examples

_DOCUMENTED = (
    "numpy",
    "numpy.linalg",
    "scipy.signal",
    "scipy.optimize",
    "jax.numpy",
    "jax.lax",
    "optax",
    "keras.layers",
)
_SHORTEST, _LONGEST = 100, 1600  # Letters of a docstring; a token has about four.


class Job(NamedTuple):
    """Examples, and how each contender is to run them.

    Attributes:
        examples: Tokenized; the same for all.
        row_length: Positions of a packed row, of ours (`data.row_length`).
        fixed_length: What the tutorial pads each example to.
        peer_batch_size: Examples that transformers pads to the longest among them.
    """

    examples: list[TokenizedExample]
    row_length: int
    fixed_length: int
    peer_batch_size: int

    @property
    def num_tokens(self) -> int:
        """Positions that are no padding, in one pass."""
        return sum(len(example.token_ids) - 1 for example in self.examples)

    @property
    def num_targets(self) -> int:
        """Positions with a loss, in one pass."""
        return sum(int(example.is_target[1:].sum()) for example in self.examples)


def job(name: str, num_examples: int, tokenizer, family: str = "gemma3", max_length: int = 512) -> Job:
    """Returns a job by its name, `documents` or `chats`; always the same examples for the same installed packages."""
    everything = {"documents": documents, "chats": chats}[name]()
    tokens = tokenize_examples(everything, template_for(family), tokenizer, max_length, "truncate").examples
    row_length, fixed_length, peer_batch_size = {"documents": (1024, 512, 1), "chats": (512, 256, 8)}[name]
    return Job(_some_of_all_lengths(tokens, num_examples), row_length, fixed_length, peer_batch_size)


def documents() -> list[Example]:
    """Returns what the installed packages say of their functions."""
    found: dict[str, Example] = {}
    for module_name in _DOCUMENTED:
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", dir(module))):
            text = inspect.getdoc(getattr(module, name, None)) or ""
            if callable(getattr(module, name, None)) and _SHORTEST <= len(text) <= _LONGEST and text not in found:
                question = Turn("user", f"What does {module_name}.{name} do?")
                found[text] = Example((question, Turn("model", text)))
    return list(found.values())


def chats() -> list[Example]:
    """Returns the support desk's questions, each with the first sentence of its answer."""
    examples = load_examples("sample:smartphone_support")[:330]  # Those that all figures were measured with.
    sentences = [re.split(r"(?<=[.!?])\s", example.answer)[0] for example in examples]
    return [
        Example((Turn("user", example.question), Turn("model", sentence)))
        for example, sentence in zip(examples, sentences, strict=True)
    ]


def _some_of_all_lengths(examples: Sequence[TokenizedExample], count: int) -> list[TokenizedExample]:
    if count > len(examples):
        raise ValueError(f"{count} examples were asked for; there are {len(examples)}.")
    by_length = sorted(examples, key=lambda example: len(example.token_ids))
    chosen = [by_length[(2 * index + 1) * len(by_length) // (2 * count)] for index in range(count)]
    random.Random(0).shuffle(chosen)
    return chosen
