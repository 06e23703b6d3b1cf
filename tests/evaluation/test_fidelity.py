"""Divergence and agreement against plain NumPy and SciPy on full logits, and the same figures as `eval`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from gemma_tune.config import Config
from gemma_tune.data import load_examples
from gemma_tune.evaluation.fidelity import (
    SoftCappedLMHead,
    candidate_quality,
    compare_positions,
    divergence,
    reference_quality,
)
from gemma_tune.evaluation.measure import target_states, targets_of, timed_answers
from gemma_tune.models.functional import final_soft_cap, lm_head_weights, parameters
from gemma_tune.pipeline import compare, evaluate
from gemma_tune.quantization.codes import dequantize, quantize
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.serving.generation import generate

QUANT_SPECS = [QuantSpec("int8"), QuantSpec("int4", 32), QuantSpec("nf4", 32), QuantSpec("nf4", 32, double=True)]
NUM_POSITIONS, VOCABULARY = 150, 1000  # Neither a multiple of what is computed at once.


def random_model(rng, width, soft_cap=None, quant_spec=None):
    """A head, hidden states, and the logits by their definition."""
    weights = rng.normal(size=(VOCABULARY, width)).astype(np.float32)
    hidden = rng.normal(size=(NUM_POSITIONS, width)).astype(np.float32) * 4 / np.sqrt(width)
    held = jnp.asarray(weights)
    if quant_spec:
        held = jax.tree.map(jnp.asarray, quantize(weights[:, :, None], quant_spec))
        weights = np.asarray(dequantize(held))[..., 0]
    logits = hidden.astype(np.float64) @ weights.T.astype(np.float64)
    if soft_cap:
        logits = soft_cap * np.tanh(logits / soft_cap)
    return SoftCappedLMHead(held, soft_cap), hidden, logits


def by_definition(a, b, targets):
    """KL, losses and agreement in float64 from [T, V] logits."""
    log_p, log_q = log_softmax(a, axis=1), log_softmax(b, axis=1)
    places = np.arange(len(targets)), targets
    return {
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(axis=1),
        "reference_loss": -log_p[places],
        "loss": -log_q[places],
        "agrees": a.argmax(axis=1) == b.argmax(axis=1),
        "reference_is_correct": a.argmax(axis=1) == targets,
        "is_correct": b.argmax(axis=1) == targets,
    }


def choose_targets(rng, *logits):
    """Random ones, and the models' likeliest, so that some predictions are right."""
    targets = rng.integers(0, VOCABULARY, NUM_POSITIONS).astype(np.int32)
    for place, each in enumerate(logits):
        targets[place::4] = each.argmax(axis=1)[place::4]
    return targets


@pytest.mark.parametrize("soft_caps", [(None, None), (None, 5.0), (30.0, 30.0)], ids=str)
@pytest.mark.parametrize("tile", [64, 256, 1000, 4096])
def test_figures_are_those_of_full_logits(rng, soft_caps, tile):
    """Whatever the tile, and with models of different widths."""
    (one, hidden, a), (other, other_hidden, b) = (
        random_model(rng, width, cap) for width, cap in zip((32, 48), soft_caps, strict=True)
    )
    targets = choose_targets(rng, a, b)
    figures = compare_positions(one, hidden, other, other_hidden, targets, tile=tile)
    wanted = by_definition(a, b, targets)
    for name, values in wanted.items():
        assert getattr(figures, name).shape == (NUM_POSITIONS,)
        if values.dtype == bool:
            np.testing.assert_array_equal(getattr(figures, name), values, err_msg=name)
        else:  # Differences of log-sum-exps of about 10, in float32.
            np.testing.assert_allclose(getattr(figures, name), values, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
def test_a_quantized_head_is_its_dequantized_one(rng, quant_spec):
    one, hidden, a = random_model(rng, 64)
    other, _, b = random_model(np.random.default_rng(20240731), 64, quant_spec=quant_spec)  # The same weights, rounded.
    b = hidden.astype(np.float64) @ np.asarray(dequantize(other.weights), np.float64)[..., 0].T
    targets = choose_targets(rng, a, b)
    figures = compare_positions(one, hidden, other, hidden, targets, tile=256)
    wanted = by_definition(a, b, targets)
    np.testing.assert_allclose(figures.kl, wanted["kl"], rtol=1e-3, atol=5e-6)
    np.testing.assert_array_equal(figures.agrees, wanted["agrees"])
    assert 0 < wanted["kl"].mean() < 0.5 and wanted["agrees"].mean() > 0.7  # Near, and not the same.


def test_a_model_and_itself(rng):
    """Not near 0: 0, whatever the soft cap. And never below, for a model that hardly differs."""
    for cap in (None, 30.0):
        head, hidden, logits = random_model(rng, 32, cap)
        figures = compare_positions(head, hidden, head, hidden, choose_targets(rng, logits))
        values = divergence(figures, np.arange(NUM_POSITIONS))
        assert values[:4] == (0.0, 0.0, 0.0, 1.0) and values.loss_increase == 0.0
        nearly = compare_positions(head, hidden, head, hidden * np.float32(1 + 1e-6), choose_targets(rng, logits))
        assert (nearly.kl >= 0).all() and nearly.kl.max() < 1e-5


def test_far_apart_models_have_a_finite_divergence(rng):
    """Probabilities that are 0 in float32: only their logarithms are held."""
    head, hidden, logits = random_model(rng, 32)
    far = rng.normal(size=hidden.shape).astype(np.float32)
    targets = choose_targets(rng, logits)
    figures = compare_positions(head, hidden * 30, head, far * 30, targets)
    wanted = by_definition(logits * 30, far.astype(np.float64) * 30 @ np.asarray(head.weights, np.float64).T, targets)
    np.testing.assert_allclose(figures.kl, wanted["kl"], rtol=1e-5, atol=1e-3)  # Logits of 500 have steps of 3e-5.
    assert figures.kl.max() > 100


def test_only_rows_that_both_vocabularies_have_count(rng):
    """Some checkpoints fill their vocabulary up."""
    head, hidden, logits = random_model(rng, 32)
    longer = SoftCappedLMHead(jnp.concatenate([head.weights, jnp.ones((24, 32))]), None)
    targets = choose_targets(rng, logits)
    for one, other in ((head, longer), (longer, head)):
        figures = compare_positions(one, hidden, other, hidden, targets)
        assert figures.kl.max() == 0 and figures.agrees.all()


def test_sums_of_positions(rng):
    """Means and percentiles by NumPy; the standard error by drawing examples again and again."""
    one, hidden, a = random_model(rng, 32)
    other, other_hidden, b = random_model(rng, 32)
    targets = choose_targets(rng, a, b)
    figures = compare_positions(one, hidden, other, other_hidden, targets)
    examples = np.repeat(np.arange(30), 5)
    values = divergence(figures, examples)
    wanted = by_definition(a, b, targets)
    assert values.mean_kl == pytest.approx(wanted["kl"].mean(), rel=1e-5)
    assert values.median_kl == pytest.approx(np.median(wanted["kl"]), rel=1e-5)
    assert values.p99_kl == pytest.approx(np.percentile(wanted["kl"], 99), rel=1e-5)
    assert values.agreement == wanted["agrees"].mean()
    increase = (wanted["loss"] - wanted["reference_loss"]).reshape(30, 5)
    assert values.loss_increase == pytest.approx(increase.mean(), rel=1e-5)
    drawn = [increase[rng.integers(0, 30, 30)].mean() for _ in range(4000)]
    assert values.loss_increase_error == pytest.approx(np.std(drawn), rel=0.08)  # 29/30, and chance of 4,000 draws.
    assert divergence(figures, np.zeros(NUM_POSITIONS, int)).loss_increase_error is None
    for quality, name in ((reference_quality(figures), "reference_"), (candidate_quality(figures), "")):
        assert quality.loss == pytest.approx(wanted[f"{name}loss"].mean(), rel=1e-5)
        assert quality.perplexity == pytest.approx(np.exp(wanted[f"{name}loss"].mean()), rel=1e-4)
        assert quality.token_accuracy == wanted[f"{name}is_correct"].mean()


def test_all_families_against_their_own_logits(some_family, tiny):
    """From the model to the figures: hidden states, head and soft cap are those of KerasHub's full call."""
    from gemma_tune.data import template_for
    from gemma_tune.data.tokenize import tokenize_examples
    from gemma_tune.models.sources.tokenizer import tokenizer_of
    from gemma_tune.training.batches import HeldoutBatches

    models = tiny(some_family), tiny(some_family, seed=1)
    examples = load_examples("sample:smartphone_support/heldout")[:5]
    tokens = tokenize_examples(examples, template_for(some_family), tokenizer_of(models[0]), 96, "truncate").examples
    batches = HeldoutBatches(tokens, 2, 96, packing=True)
    positions = targets_of(batches)
    sides = []
    for model in models:
        states = target_states(model, batches, lambda count: None)
        assert states.tokens_per_second > 0
        sides += [SoftCappedLMHead(lm_head_weights(model.backbone), final_soft_cap(model.backbone)), states.hidden]
    figures = compare_positions(*sides, positions.target_ids)
    found = [divergence(figures, positions.example_ids), reference_quality(figures), candidate_quality(figures)]

    ids, is_target = np.zeros((2, len(tokens), 97), np.int32)
    for row, example in enumerate(tokens):  # Each in a row of its own.
        ids[row, : len(example.token_ids)] = example.token_ids
        is_target[row, : len(example.token_ids)] = example.is_target
    inputs = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, :-1])}
    inputs["position_ids"] = np.broadcast_to(np.arange(96), ids[:, :-1].shape)
    chosen = is_target[:, 1:] > 0
    logits = [
        np.asarray(model({name: inputs[name] for name in model.backbone.input}), np.float64)[chosen] for model in models
    ]
    wanted = by_definition(*logits, ids[:, 1:][chosen])
    assert sorted(positions.target_ids) == sorted(ids[:, 1:][chosen])
    assert len(np.unique(positions.example_ids)) == len(tokens)
    # Packed and unpacked, the same sums in another order; Gemma 4 magnifies roundings the most.
    assert found[0].mean_kl == pytest.approx(wanted["kl"].mean(), rel=1e-3)
    assert [each.loss for each in found[1:]] == pytest.approx(
        [wanted["reference_loss"].mean(), wanted["loss"].mean()], rel=1e-4
    )


def test_counted_as_eval_counts(tiny):
    """Loss, perplexity and token accuracy of reference and candidate are those of `evaluate`."""
    examples = load_examples("sample:smartphone_support/heldout")[:12]
    report = compare("tiny", ["tiny", "tiny@int8"], examples, num_answers=0)
    for model, arguments in zip(report.models, ({}, {}, {"quant_spec": QuantSpec("int8")}), strict=True):
        wanted = evaluate(tiny(**arguments), examples)
        assert wanted["num_tokens"] == report.num_tokens == report.num_tokens_in_data
        for name, value in model.quality._asdict().items():
            assert value == pytest.approx(wanted[name], rel=1e-5), (model.name, name)
    itself, rounded = report.candidates
    assert itself.divergence[:4] == (0.0, 0.0, 0.0, 1.0)
    assert 0 < rounded.divergence.mean_kl < rounded.divergence.p99_kl < 1 and rounded.divergence.agreement > 0.8


def test_answers_are_those_of_generate(tiny):
    model = tiny()
    prompts = ["How do I reset my phone?", "Hi"]
    answers = timed_answers(model, prompts, 6)
    assert answers.texts == generate(model, prompts, max_new_tokens=6)
    assert answers.tokens_per_second > 0
    assert timed_answers(model, prompts, 1).tokens_per_second is None


def test_bfloat16(tiny):
    """Half as much memory, and still 0 from itself."""
    examples = load_examples("sample:smartphone_support/heldout")[:4]
    config = Config().replace({"model.precision": "bfloat16"})
    report = compare("tiny", ["tiny"], examples, config=config, num_answers=0)
    in_float32 = sum(value.nbytes for group in parameters(tiny()) for value in group.values())
    assert report.reference.memory_bytes == in_float32 / 2
    assert report.candidates[0].divergence.mean_kl == 0.0
