"""What the benchmarks train on: text that every machine with this package has.

documents: docstrings of the installed scientific packages, asked for by their functions' names; about 300 tokens on
    average, cut at 512.
chats: questions and answers of the shipped support desk; about 40 tokens.
"""

import importlib
import inspect
import random
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
_SHORTEST, _LONGEST = 200, 1500  # Letters of a docstring; a token has about four.
_SHORT_CHAT = 200  # Letters of question and answer together.


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
    examples = {"documents": documents, "chats": chats}[name](num_examples)
    tokens = tokenize_examples(examples, template_for(family), tokenizer, max_length, "truncate").examples
    row_length, fixed_length, peer_batch_size = {"documents": (1024, 512, 1), "chats": (512, 256, 8)}[name]
    return Job(tokens, row_length, fixed_length, peer_batch_size)


def documents(count: int) -> list[Example]:
    """Returns what the installed packages say of some of their functions."""
    found: dict[str, Example] = {}
    for module_name in _DOCUMENTED:
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", dir(module))):
            text = inspect.getdoc(getattr(module, name, None)) or ""
            if callable(getattr(module, name, None)) and _SHORTEST <= len(text) <= _LONGEST and text not in found:
                question = Turn("user", f"What does {module_name}.{name} do?")
                found[text] = Example((question, Turn("model", text)))
    return random.Random(0).sample(list(found.values()), count)


def chats(count: int) -> list[Example]:
    """Returns some of the support desk's shorter questions with their answers."""
    examples = load_examples("sample:smartphone_support")
    short = [example for example in examples if len(example.question) + len(example.answer) <= _SHORT_CHAT]
    return random.Random(0).sample(short, count)
