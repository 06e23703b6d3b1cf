"""Computes held-out metrics of a model, and finds what a run held out."""

from collections.abc import Sequence

from gemma_tune.config import Config
from gemma_tune.data import Example, template_for
from gemma_tune.data.tokenize import tokenize_examples
from gemma_tune.errors import DataError, TrainingError
from gemma_tune.evaluation import evaluate_batches
from gemma_tune.models.attention.packing_masks import enable_packing
from gemma_tune.models.family import family_of
from gemma_tune.models.functional import parameters
from gemma_tune.models.restored_layers import restored_layers
from gemma_tune.models.sharding.layers import enable_mesh_sharding
from gemma_tune.models.sharding.placement import mesh_sharding_of
from gemma_tune.models.sources.source import parse_source
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.pipeline.setup import read_splits
from gemma_tune.runtime.backend import keras
from gemma_tune.training.batches import HeldoutBatches, OnMesh, most_targets
from gemma_tune.training.step.train_step import make_eval_step
from gemma_tune.workdir_config import read_workdir_config


def evaluate(
    model: keras.Model, examples: Sequence[Example], *, max_length: int = 512, batch_size: int = 4
) -> dict[str, float]:
    """Returns loss, perplexity and token accuracy of a model on examples.

    Args:
        model: CausalLM, from `load_model` or `train`. It is left as it is.
        examples: Examples, from `load_examples`.
        max_length: Most tokens of an example; longer documents are cut into pieces, conversations are shortened.
        batch_size: Rows of a batch; on a mesh, rounded up to a multiple of the number of row shards.

    Raises:
        TrainingError: No example has an answer to score.
    """
    tokenizer = tokenizer_of(model)
    template = template_for(family_of(model), tokenizer)
    tokens = tokenize_examples(examples, template, tokenizer, max_length, "chunk")
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


def run_config(source: str) -> Config | None:
    """Returns the Config of a run, or None if the source is no workdir of a run."""
    parsed = parse_source(source)
    return read_workdir_config(parsed.value) if parsed.kind == "run" else None


def heldout_of_run(config: Config) -> tuple[Sequence[Example], str]:
    """Returns what a run held out, and a name for it.

    Raises:
        DataError: The run's data can't be read any more; says how to name other data.
    """
    try:
        return read_splits(config).heldout, f"{config.data.source} (held out)"
    except DataError as error:
        raise DataError(
            f"{error} The run's own data say what it held out. If they have moved, or for other questions, name them: "
            "--data=FILE."
        ) from error
