"""Compares models on the same held-out data: what each costs in memory and speed, and in the quality of answers."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from gemma_tune.config import Config
from gemma_tune.data import Example
from gemma_tune.errors import ConfigError
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
from gemma_tune.evaluation.measure import TargetStates, TimedAnswers, target_states, timed_answers
from gemma_tune.models.functional import final_soft_cap, lm_head_weights, parameters
from gemma_tune.models.load import load_model
from gemma_tune.models.sources.source import SchemedSource
from gemma_tune.models.sources.weight_files import weight_bytes
from gemma_tune.pipeline.comparison_data import (
    ComparisonData,
    choose_data,
    find_examples,
    model_named_in_errors,
    parse_models,
)
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime import progress
from gemma_tune.runtime.process_memory import release_freed_memory


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

    Of a model that was run only its LM head and its hidden states stay in memory.

    Args:
        reference: Name of the reference, as in `load_model`. With `@int8`, `@int4` or `@nf4` behind it, the model is
            quantized.
        candidates: Names of the other models, as a list or separated by commas. None: the reference in each of the
            schemes.
        data: Held-out data, as in `config.DataConfig` or from `load_examples`. Empty: what the first run among the
            models held out; without a run, the held-out part of `config.data.source`.
        config: Settings, of which data.max_length, training.batch_size, model.precision, model.block_size,
            generation.max_new_tokens and seed are used.
        max_tokens: Largest number of target tokens to score; of more data, examples are drawn.
        num_answers: Number of questions that all models answer, greedily.
        output: Folder for the table, the picture and the report. Empty: nothing is written.

    Raises:
        ConfigError, DataError, ModelError: The message says what is wrong, and with which model. Names and data are
            checked before anything is computed.
    """
    config = config or Config()
    for name, value, least in (("max_tokens", max_tokens, 1), ("num_answers", num_answers, 0)):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}.")
    models = parse_models(reference, candidates)
    examples, source = find_examples(models, data, config)
    chosen = choose_data(models, examples, config, max_tokens, num_answers)
    if output:
        _make_folder(output)  # Before anything that takes long.
    report = FidelityReport(
        data_source=source,
        num_examples=chosen.num_examples,
        num_tokens=len(chosen.targets.target_ids),
        num_tokens_in_data=chosen.num_tokens_in_data,
        precision=config.model.precision,
        device=jax.devices()[0].device_kind,
        questions=[example.question for example in chosen.questions],
        wanted_answers=[example.answer for example in chosen.questions],
        models=_compare_all(models, chosen, config),
    )
    if output:
        write_comparison(Path(output).expanduser(), report)
    return report


class _Measured(NamedTuple):
    """What is kept of a model after it was run.

    Attributes:
        name: Name of the model.
        memory_bytes: Bytes of its arrays.
        disk_bytes: Bytes of its files; None if it has none.
        states: Hidden states of the target positions.
        answers: Answers to the questions.
        head: LM head.
    """

    name: SchemedSource
    memory_bytes: int
    disk_bytes: int | None
    states: TargetStates
    answers: TimedAnswers
    head: SoftCappedLMHead

    def figures(self, quality: Quality, divergence: Divergence | None) -> ModelFigures:
        """Returns the figures of the model in a report. The reference has no divergence."""
        return ModelFigures(
            name=str(self.name),
            memory_bytes=self.memory_bytes,
            disk_bytes=self.memory_bytes if self.name.scheme else self.disk_bytes,
            has_files=not self.name.scheme,
            quality=quality,
            divergence=divergence,
            reading_tokens_per_second=self.states.tokens_per_second,
            writing_tokens_per_second=self.answers.tokens_per_second,
            answers=self.answers.texts,
        )


def _compare_all(models: Sequence[SchemedSource], data: ComparisonData, config: Config) -> list[ModelFigures]:
    """Runs the reference, then each candidate, and compares it with what is kept of the reference."""
    target_ids, example_ids = data.targets
    reference = _measure(models[0], data, config)
    figures: list[ModelFigures] = []
    for name in models[1:]:
        candidate = _measure(name, data, config)
        with progress.track_progress(f"{name}: compared tokens", len(target_ids)) as advance:
            positions = compare_positions(
                reference.head,
                reference.states.hidden,
                candidate.head,
                candidate.states.hidden,
                target_ids,
                advance=advance,
            )
        if not figures:
            figures.append(reference.figures(reference_quality(positions), None))
        figures.append(candidate.figures(candidate_quality(positions), divergence(positions, example_ids)))
        del candidate  # Before the next model is loaded.
    return figures


def _measure(name: SchemedSource, data: ComparisonData, config: Config) -> _Measured:
    """Loads a model and runs it; then only its LM head stays in memory."""
    quant_spec = QuantSpec(name.scheme, config.model.block_size) if name.scheme else None
    num_tokens = len(data.targets.target_ids)
    with model_named_in_errors(str(name)):
        with progress.console.status(f"Loading {name}…"):
            model = load_model(name.source, precision=config.model.precision, quant_spec=quant_spec, seed=config.seed)
        with progress.track_progress(f"{name}: read tokens", num_tokens) as advance:
            states = target_states(model, data.batches, advance)
    prompts = [example.prompt for example in data.questions]
    with progress.track_progress(f"{name}: answered questions", len(prompts)) as advance:
        answers = timed_answers(model, prompts, config.generation.max_new_tokens, advance)
    groups = parameters(model)
    memory_bytes = sum(array.nbytes for group in groups for array in group.values())
    head = SoftCappedLMHead(lm_head_weights(model.backbone), final_soft_cap(model.backbone))
    del model, groups
    gc.collect()
    release_freed_memory()
    return _Measured(name, memory_bytes, weight_bytes(name.source), states, answers, head)


def _make_folder(output: str) -> None:
    try:
        Path(output).expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder {output} can't be created: {error}. Choose another --output.") from error
