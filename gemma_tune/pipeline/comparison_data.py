"""The models of a comparison, and the held-out data that all of them are run on."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gemma_tune.config import Config
from gemma_tune.data import Batch, Example, TokenizedExample, TokenStore, load_examples, template_for
from gemma_tune.data.sources.readers import heldout_of
from gemma_tune.data.tokenize import tokenize_examples
from gemma_tune.errors import DataError, ModelError
from gemma_tune.evaluation import choose_questions
from gemma_tune.evaluation.measure import Targets, targets_of
from gemma_tune.models.load import load_tokenizer
from gemma_tune.models.sources.source import SchemedSource, parse_schemed
from gemma_tune.pipeline.scoring import heldout_of_run, run_config
from gemma_tune.pipeline.setup import row_options
from gemma_tune.training.batches import HeldoutBatches

_DEFAULT_SCHEMES = ("int8", "nf4", "int4")


class ComparisonData(NamedTuple):
    """What all models of a comparison are run on.

    Attributes:
        batches: Batches of the chosen examples.
        targets: Target positions of the batches.
        num_examples: Number of chosen examples.
        num_tokens_in_data: Number of target tokens in all examples.
        questions: Examples whose questions are answered.
    """

    batches: Sequence[Batch]
    targets: Targets
    num_examples: int
    num_tokens_in_data: int
    questions: list[Example]


def parse_models(reference: str, candidates: str | Sequence[str]) -> list[SchemedSource]:
    """Returns the reference and the candidates, each once.

    Args:
        reference: Name of the reference.
        candidates: Names as a list or separated by commas. None: the reference in each quantization scheme.
    """
    if isinstance(candidates, str):
        candidates = [name.strip() for name in candidates.split(",") if name.strip()]
    first = parse_schemed(reference)
    others = [parse_schemed(name) for name in candidates]
    if not others:
        others = [SchemedSource(first.source, scheme) for scheme in _DEFAULT_SCHEMES if scheme != first.scheme]
    return [first, *dict.fromkeys(others)]


def find_examples(
    models: Sequence[SchemedSource], data: str | Sequence[Example], config: Config
) -> tuple[Sequence[Example], str]:
    """Returns the examples to compare on, and a name for them.

    Args:
        models: Models of the comparison.
        data: Examples, or their source, or '': what the first run among the models held out; without a run, the
            held-out part of `config.data.source`.
        config: Settings of the data.
    """
    if not isinstance(data, str):
        return data, "the given data"
    runs = (run_config(model.source) for model in models)
    run = None if data else next(filter(None, runs), None)
    if run:
        return heldout_of_run(run)
    source = data or heldout_of(config.data.source) or config.data.source
    return load_examples(source, config.data.split, config.data.on_error, row_options(config)), source


def choose_data(
    models: Sequence[SchemedSource], examples: Sequence[Example], config: Config, max_tokens: int, num_answers: int
) -> ComparisonData:
    """Tokenizes the examples, and draws some if there are too many.

    Args:
        models: Models of the comparison.
        examples: Examples to choose from.
        config: Settings of the rows, and the seed.
        max_tokens: Largest number of target tokens.
        num_answers: Number of questions to answer.

    Raises:
        DataError: No example has a target token.
        ModelError: Two models read the examples as different tokens.
    """
    max_length = config.data.max_length
    sources = list(dict.fromkeys(model.source for model in models))
    tokens = _tokenize(sources[0], examples, max_length)
    if not tokens:
        raise DataError(f"None of {len(examples)} examples has an answer that fits into {max_length} tokens.")
    counts = np.array([int(each.is_target.sum()) for _, each in tokens])
    order = np.random.default_rng(config.seed).permutation(len(tokens))
    num_chosen = max(1, int(np.searchsorted(np.cumsum(counts[order]), max_tokens, side="right")))
    chosen = [tokens[i] for i in sorted(order[:num_chosen].tolist())]
    kept = [example for example, _ in chosen]
    for source in sources[1:]:
        others = _tokenize(source, kept, max_length)
        if len(others) != len(chosen) or not all(map(_are_equal, chosen, others)):
            raise ModelError(
                f"{source} reads the data as other tokens than {sources[0]}: its tokenizer or its chat template "
                "differs, and predictions of different tokens can't be compared. Compare models of one family."
            )
    store = TokenStore.of([each for _, each in chosen])
    batches = HeldoutBatches(store, config.training.batch_size, max_length, packing=True)
    questions = choose_questions(kept, num_answers, config.seed)
    return ComparisonData(batches, targets_of(batches), len(chosen), int(counts.sum()), questions)


def _tokenize(source: str, examples: Sequence[Example], max_length: int) -> list[tuple[Example, TokenizedExample]]:
    """Returns the examples that have target tokens, with their tokens."""
    with model_named_in_errors(source):
        tokenizer, family = load_tokenizer(source)
    tokens = tokenize_examples(examples, template_for(family, tokenizer), tokenizer, max_length, "truncate")
    return [(examples[i], each) for i, each in zip(tokens.kept.tolist(), tokens.examples, strict=True)]


def _are_equal(one: tuple[Example, TokenizedExample], other: tuple[Example, TokenizedExample]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@contextlib.contextmanager
def model_named_in_errors(name: str) -> Iterator[None]:
    """A context in which the message of a ModelError gets the model's name in front, if it isn't in it."""
    try:
        yield
    except ModelError as error:
        if name in str(error):
            raise
        raise ModelError(f"{name}: {error}") from error
