"""Held-out metrics of a model, and of a tuned model beside its base."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from gemma_tune.config import Config
from gemma_tune.data import Example, load_examples, template_for
from gemma_tune.data.tokenize import tokenize_examples
from gemma_tune.errors import TrainingError
from gemma_tune.evaluation import evaluate_batches
from gemma_tune.models.attention.packing_masks import enable_packing
from gemma_tune.models.family import family_of
from gemma_tune.models.functional import assign, parameters
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.load import load_configured, load_model
from gemma_tune.models.lora.enable import neutral_lora_values
from gemma_tune.models.restored_layers import restored_layers
from gemma_tune.models.sharding.layers import enable_mesh_sharding
from gemma_tune.models.sharding.placement import mesh_sharding_of
from gemma_tune.models.sources.source import parse_source
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.pipeline.setup import read_splits
from gemma_tune.runtime.backend import keras
from gemma_tune.runtime.json_files import read_json
from gemma_tune.training.batches import HeldoutBatches, OnMesh, most_targets
from gemma_tune.training.step.train_step import make_eval_step


def evaluate(
    model: keras.Model, examples: Sequence[Example], *, max_length: int = 512, batch_size: int = 4
) -> dict[str, float]:
    """Returns loss, perplexity and token accuracy of a model on examples.

    Args:
        model: CausalLM, from `load_model` or `train`. It is left as it is.
        examples: Examples, from `load_examples`.
        max_length: Most tokens of an example; longer ones are cut.
        batch_size: Rows of a batch; on a mesh, rounded up to a multiple of the number of row shards.

    Raises:
        TrainingError: No example has an answer to score.
    """
    tokens = tokenize_examples(examples, template_for(family_of(model)), tokenizer_of(model), max_length, "truncate")
    if not tokens.examples:
        raise TrainingError(f"None of {len(examples)} examples has an answer that fits into {max_length} tokens.")
    sharding = mesh_sharding_of(model.backbone)
    num_parts = sharding.shape.num_row_shards if sharding else 1
    batches = HeldoutBatches(tokens.examples, -(-batch_size // num_parts) * num_parts, max_length, packing=True)
    groups = parameters(model)
    step = make_eval_step(model, most_targets(batches, num_parts), sharding=sharding)
    scored = OnMesh(batches, sharding) if sharding else batches
    with restored_layers(model.backbone):
        enable_packing(model.backbone)
        if sharding:
            enable_mesh_sharding(model.backbone, sharding)
        return evaluate_batches(lambda batch: step(groups.trainable, groups.frozen, batch), scored)


@dataclasses.dataclass
class Comparison:
    """Held-out metrics of a tuned model and its base.

    Attributes:
        data_source: Name of the data.
        num_examples: Number of examples.
        base: Metrics of the base.
        tuned: Metrics of the tuned model; empty if nothing is tuned.
    """

    data_source: str
    num_examples: int
    base: dict[str, float]
    tuned: dict[str, float]


def compare_with_base(config: Config, adapter: str, data_is_given: bool) -> Comparison:
    """Scores `config.model.source`, with an adapter if one is named, and its base.

    Args:
        config: Settings: model, data, length and batch size.
        adapter: Path of a LoRA adapter, or ''.
        data_is_given: Whether `config.data` is scored. False: for the workdir of a run, what that run held out.
    """
    source = config.model.source
    run = run_config(source)
    examples: Sequence[Example]
    if run and not data_is_given:
        examples, data_source = heldout_of_run(run)
    else:
        data_source = config.data.source
        examples = load_examples(data_source, config.data.split, config.data.on_error)
    model = load_configured(config, adapter)
    score = functools.partial(
        evaluate, examples=examples, max_length=config.data.max_length, batch_size=config.training.batch_size
    )
    if lora_layers(model.backbone):
        tuned = score(model)
        assign(model, neutral_lora_values(model.backbone))
        return Comparison(data_source, len(examples), score(model), tuned)
    if run:
        sharding = mesh_sharding_of(model.backbone)
        base = load_model(run.model.source, precision=config.model.precision, seed=run.seed, sharding=sharding)
        return Comparison(data_source, len(examples), score(base), score(model))
    return Comparison(data_source, len(examples), score(model), {})


def run_config(source: str) -> Config | None:
    """Returns the Config of a run, or None if the source is no workdir of a run."""
    parsed = parse_source(source)
    return Config.from_saved(read_json(Path(parsed.value) / "config.json")) if parsed.kind == "run" else None


def heldout_of_run(config: Config) -> tuple[Sequence[Example], str]:
    """Returns what a run held out, and a name for it."""
    return read_splits(config).heldout, f"{config.data.source} (held out)"
