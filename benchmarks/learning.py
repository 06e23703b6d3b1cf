"""What models in few bits learn, and what rounding does to a model: the parts of `benchmarks.quantization` by model."""

import functools
import sys
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.jobs import documents
from gemma_tune.config import Config
from gemma_tune.models.functional import assign
from gemma_tune.models.load import load_model
from gemma_tune.models.quantized.convert import quantize_layers
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.models.transforms import transform_for_training
from gemma_tune.pipeline import evaluate, read_splits, set_up
from gemma_tune.quantization.spec import PTQ_SCHEMES, QuantSpec
from gemma_tune.training.calibration import calibration_batches, quantize_calibrated
from gemma_tune.training.step.loss import make_loss_of_hidden
from gemma_tune.training.step.per_block import PerBlockProgram
from gemma_tune.training.step.per_block_gradients import PerBlockGradients


class Learnt(NamedTuple):
    """point: factors after a third of the steps. gradients: there, by path. before, after: held-out losses."""

    point: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    before: float
    after: float


def learn(model: str, scheme: str, block_size: int, steps: int, rank: int, point: dict | None) -> Learnt:
    """Trains LoRA on the support desk's questions.

    Args:
        model: Any that gemma_tune loads.
        scheme: `float32`, or one that its weights are held in.
        block_size: Of it.
        steps: Of one row of 512.
        rank: LoRA's, on all linear layers.
        point: Where to take the gradients; None: where this run is after a third of its steps.
    """
    is_float = scheme == "float32"
    with tempfile.TemporaryDirectory() as folder:
        config = Config().replace(
            {
                "workdir": folder,
                "model.source": model,
                "model.quantize": "" if is_float else scheme,
                "model.block_size": block_size,
                "data.source": "sample:smartphone_support",
                "training.method": "lora" if is_float else "qlora",
                "training.batch_size": 1,
                "training.num_train_steps": steps,
                "lora.rank": rank,
                "lora.target_layers": ["all-linear"],
            }
        )
        setup = set_up(config, read_splits(config))
    state = setup.state
    before = setup.evaluate(state.trainable)["loss"]
    for index in range(len(setup.batches)):
        if point is None and index == len(setup.batches) // 3:
            point = {path: np.array(value) for path, value in state.trainable.items()}
        state, _ = setup.train_step(state, setup.frozen, setup.batches[index])
    after = setup.evaluate(state.trainable)["loss"]
    assert point is not None
    assign(setup.model, state.trainable)  # The step took over the model's own buffers.
    most = setup.batches.most_targets
    gradients, _ = PerBlockGradients(
        PerBlockProgram(setup.model, "dots"), {most: make_loss_of_hidden(setup.model, most)}
    )({path: jax.numpy.asarray(value) for path, value in point.items()}, setup.frozen, None, setup.batches[0])
    return Learnt(point, {path: np.asarray(value) for path, value in gradients.items()}, before, after)


def rounded_losses(source: str, block_size: int, num_tokens: int, num_heldout: int) -> dict[str, float]:
    """Returns scheme -> loss of held-out documents, that of the model as it is as `float32`."""
    examples = documents()
    heldout, others = examples[:: max(1, len(examples) // num_heldout)][:num_heldout], []
    kept = {id(example) for example in heldout}
    others = [example for example in examples if id(example) not in kept]
    score = functools.partial(evaluate, examples=heldout, batch_size=1)
    losses = {"float32": score(load_model(source))["loss"]}
    print(f"float32: {losses['float32']:.4f}", file=sys.stderr)
    for name, way in PTQ_SCHEMES.items():
        model = load_model(source)
        quant_spec = QuantSpec(way.scheme, block_size)
        if way.method:
            batches = _calibration_batches(model, others, num_tokens)
            transform_for_training(model, None, packing=True, remat="none", row_length=512)
            quantize_calibrated(model, batches, way.method, quant_spec)
        else:
            quantize_layers(model.backbone, quant_spec, way.rounds_inputs)
        losses[name] = score(model)["loss"]
        print(f"{name}: {losses[name]:.4f}", file=sys.stderr)
    return losses


def _calibration_batches(model: Any, examples: list, num_tokens: int) -> list:
    from gemma_tune.data import template_for
    from gemma_tune.data.tokenize import tokenize_examples
    from gemma_tune.models.family import family_of

    template = template_for(family_of(model))
    tokens = tokenize_examples(examples, template, tokenizer_of(model), 512, "truncate").examples
    return calibration_batches(tokens, 512, num_tokens)[0]
