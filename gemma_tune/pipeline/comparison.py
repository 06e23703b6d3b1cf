"""Models side by side on the same held-out data: does it fit, and what does it cost in answers?"""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from gemma_tune.config import Config
from gemma_tune.data import Batch, Example, TokenizedExample, TokenStore, load_examples, template_for
from gemma_tune.data.sources.readers import heldout_of
from gemma_tune.data.tokenize import tokenize_examples
from gemma_tune.errors import ConfigError, DataError, ModelError
from gemma_tune.evaluation import choose_questions
from gemma_tune.evaluation.comparison_figures import (
    MAX_TOKENS,
    NUM_ANSWERS,
    Divergence,
    FidelityReport,
    ModelFigures,
    Quality,
)
from gemma_tune.evaluation.comparison_report import write_comparison
from gemma_tune.evaluation.fidelity import (
    SoftCappedLMHead,
    candidate_quality,
    compare_positions,
    divergence,
    reference_quality,
)
from gemma_tune.evaluation.measure import (
    Targets,
    TargetStates,
    TimedAnswers,
    target_states,
    targets_of,
    timed_answers,
)
from gemma_tune.models.functional import final_soft_cap, lm_head_weights, parameters
from gemma_tune.models.load import load_model, load_tokenizer
from gemma_tune.models.sources.source import SchemedSource, parse_schemed
from gemma_tune.models.sources.weight_files import weight_bytes
from gemma_tune.pipeline.scoring import heldout_of_run, run_config
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime import progress
from gemma_tune.runtime.process_memory import release_freed_memory
from gemma_tune.training.batches import HeldoutBatches

_DEFAULT_SCHEMES = ("int8", "nf4", "int4")


def compare(
    reference: str,
    candidates: str | Sequence[str] = (),
    data: str | Sequence[Example] = "",
    *,
    config: Config | None = None,
    max_tokens: int = MAX_TOKENS,
    num_answers: int = NUM_ANSWERS,
    output: str = "",
) -> FidelityReport:
    """Compares models with a reference: memory, divergence, loss, speed, and answers side by side.

    Only two models are in memory at a time, and of the reference no more than its head once it has been run.

    Args:
        reference: As in `load_model`, or with `@int8`, `@int4` or `@nf4` behind it, to hold it in few bits.
        candidates: The same, as a list or with commas between. None: the reference in each of the schemes.
        data: Held-out data, as in `config.DataConfig` or from `load_examples`. Empty: what the first run among the
            models held out; without a run, the held-out part of `config.data.source`.
        config: data.max_length, training.batch_size, model.precision, model.block_size, generation.max_new_tokens and
            seed are used.
        max_tokens: Most answer tokens to score; of more data, examples are drawn.
        num_answers: Questions that all models answer, greedily.
        output: Folder for the table, the picture and the report. Empty: nothing is written.

    Raises:
        ConfigError, DataError, ModelError: Says what is wrong, and with which model. Names and data are checked before
            anything is computed.
    """
    config = config or Config()
    for name, value, least in (("max_tokens", max_tokens, 1), ("num_answers", num_answers, 0)):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}.")
    named = _names(reference, candidates)
    examples, source = _examples(named, data, config)
    scored = _choose(named, examples, config, max_tokens, num_answers)
    if output:
        _make_folder(output)  # What can't be written is found out before what takes long.
    report = FidelityReport(
        data_source=source,
        num_examples=scored.num_examples,
        num_tokens=len(scored.positions.target_ids),
        num_tokens_in_data=scored.num_tokens_in_data,
        precision=config.model.precision,
        device=jax.devices()[0].device_kind,
        questions=[example.question for example in scored.questions],
        wanted_answers=[example.answer for example in scored.questions],
        models=_side_by_side(named, scored, config),
    )
    if output:
        write_comparison(Path(output).expanduser(), report)
    return report


class _Scored(NamedTuple):
    """What all models are run on."""

    batches: Sequence[Batch]
    positions: Targets
    num_examples: int
    num_tokens_in_data: int
    questions: list[Example]


class _Measured(NamedTuple):
    """What is left of a model after it was run."""

    name: SchemedSource
    memory_bytes: int
    disk_bytes: int | None
    states: TargetStates
    answers: TimedAnswers
    head: SoftCappedLMHead

    def figures(self, quality: Quality, apart: Divergence | None) -> ModelFigures:
        """Returns what is shown of it."""
        return ModelFigures(
            name=str(self.name),
            memory_bytes=self.memory_bytes,
            disk_bytes=self.memory_bytes if self.name.scheme else self.disk_bytes,
            has_files=not self.name.scheme,
            quality=quality,
            divergence=apart,
            reading_tokens_per_second=self.states.tokens_per_second,
            writing_tokens_per_second=self.answers.tokens_per_second,
            answers=self.answers.texts,
        )


def _names(reference: str, candidates: str | Sequence[str]) -> list[SchemedSource]:
    """Returns the reference and the candidates, each once, after looking at all names."""
    if isinstance(candidates, str):
        candidates = [name.strip() for name in candidates.split(",") if name.strip()]
    first = parse_schemed(reference)
    others = [parse_schemed(name) for name in candidates]
    if not others:
        others = [SchemedSource(first.source, scheme) for scheme in _DEFAULT_SCHEMES if scheme != first.scheme]
    return [first, *dict.fromkeys(others)]


def _examples(
    named: Sequence[SchemedSource], data: str | Sequence[Example], config: Config
) -> tuple[Sequence[Example], str]:
    if not isinstance(data, str):
        return data, "the given data"
    runs = (run_config(each.source) for each in named)
    run = None if data else next(filter(None, runs), None)
    if run:
        return heldout_of_run(run)
    source = data or heldout_of(config.data.source) or config.data.source
    return load_examples(source, config.data.split, config.data.on_error), source


def _choose(
    named: Sequence[SchemedSource], examples: Sequence[Example], config: Config, max_tokens: int, num_answers: int
) -> _Scored:
    """Tokenizes, draws examples if there are more than are to be scored, and makes sure that all models read them as
    the same tokens.
    """
    max_length = config.data.max_length
    sources = list(dict.fromkeys(each.source for each in named))
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
                f"{source} reads the data as other tokens than {sources[0]}: its tokenizer or its chat template is "
                "another, and predictions of different tokens can't be compared. Compare models of one family."
            )
    store = TokenStore.of([each for _, each in chosen])
    batches = HeldoutBatches(store, config.training.batch_size, max_length, packing=True)
    questions = choose_questions(kept, num_answers, config.seed)
    return _Scored(batches, targets_of(batches), len(chosen), int(counts.sum()), questions)


def _tokenize(source: str, examples: Sequence[Example], max_length: int) -> list[tuple[Example, TokenizedExample]]:
    """Returns the examples that have something to score, with their tokens."""
    with _naming(source):
        tokenizer, family = load_tokenizer(source)
    tokens = tokenize_examples(examples, template_for(family), tokenizer, max_length, "truncate")
    return [(examples[i], each) for i, each in zip(tokens.kept.tolist(), tokens.examples, strict=True)]


def _are_equal(one: tuple[Example, TokenizedExample], other: tuple[Example, TokenizedExample]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def _side_by_side(named: Sequence[SchemedSource], scored: _Scored, config: Config) -> list[ModelFigures]:
    """Runs the reference, then each candidate beside what is left of it."""
    target_ids, example_ids = scored.positions
    reference = _measure(named[0], scored, config)
    models: list[ModelFigures] = []
    for name in named[1:]:
        candidate = _measure(name, scored, config)
        with progress.track_progress(f"{name}: compared tokens", len(target_ids)) as advance:
            figures = compare_positions(
                reference.head,
                reference.states.hidden,
                candidate.head,
                candidate.states.hidden,
                target_ids,
                advance=advance,
            )
        if not models:
            models.append(reference.figures(reference_quality(figures), None))
        models.append(candidate.figures(candidate_quality(figures), divergence(figures, example_ids)))
        del candidate  # Before the next model is loaded.
    return models


def _measure(name: SchemedSource, scored: _Scored, config: Config) -> _Measured:
    """Loads a model, runs it, and lets go of all but its head."""
    quant_spec = QuantSpec(name.scheme, config.model.block_size) if name.scheme else None
    with _naming(str(name)), progress.console.status(f"Loading {name}…"):
        model = load_model(name.source, precision=config.model.precision, quant_spec=quant_spec, seed=config.seed)
    with (
        _naming(str(name)),
        progress.track_progress(f"{name}: read tokens", len(scored.positions.target_ids)) as advance,
    ):
        states = target_states(model, scored.batches, advance)
    prompts = [example.turns[:-1] for example in scored.questions]
    with progress.track_progress(f"{name}: answered questions", len(prompts)) as advance:
        answers = timed_answers(model, prompts, config.generation.max_new_tokens, advance)
    groups = parameters(model)
    memory_bytes = sum(array.nbytes for group in groups for array in group.values())
    head = SoftCappedLMHead(lm_head_weights(model.backbone), final_soft_cap(model.backbone))
    del model, groups
    gc.collect()
    release_freed_memory()
    return _Measured(name, memory_bytes, weight_bytes(name.source), states, answers, head)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the model's name before an error that doesn't say it."""
    try:
        yield
    except ModelError as error:
        if name in str(error):
            raise
        raise ModelError(f"{name}: {error}") from error


def _make_folder(output: str) -> None:
    try:
        Path(output).expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder {output} can't be made: {error}. Choose another --output.") from error
