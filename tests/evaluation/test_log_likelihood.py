"""Log-likelihoods equal KerasHub's own logits, whatever shares a row; and the model is left as it was."""

import numpy as np
import pytest
from scipy.special import log_softmax

from gemma_tune.errors import DataError
from gemma_tune.evaluation.likelihood.continuation_batches import continuation_batches
from gemma_tune.evaluation.likelihood.log_likelihood import LogLikelihoodScorer, log_likelihoods
from gemma_tune.models.lora.enable import enable_lora
from gemma_tune.quantization.spec import QuantSpec

BOS = 2
TOLERANCE = 1e-4  # Of sums of up to 40 float32 log-probabilities of about 6 nats.


def random_pairs(rng, sizes):
    return [
        ([BOS, *rng.integers(10, 250, before - 1).tolist()], rng.integers(10, 250, after).tolist())
        for before, after in sizes
    ]


def keras_hub_logits(model, ids):
    """KerasHub's whole logits of one row, padded at its end so that few lengths are compiled."""
    row = np.zeros((1, -(-len(ids) // 64) * 64), np.int32)
    row[0, : len(ids)] = ids
    inputs = {
        "token_ids": row,
        "padding_mask": (np.arange(row.shape[1]) < len(ids))[None].astype(np.int32),
        "position_ids": np.arange(row.shape[1], dtype=np.int32)[None],
    }
    return np.asarray(model({name: inputs[name] for name in model.backbone.input}), np.float64)[0, : len(ids)]


def by_definition(model, pair, max_length=10**6):
    """Log-probability and greediness from KerasHub's logits, in float64."""
    context, continuation = pair
    predicting = keras_hub_logits(model, [*context, *continuation][-(max_length + 1) : -1])[-len(continuation) :]
    chosen = log_softmax(predicting, axis=1)[np.arange(len(continuation)), continuation]
    return chosen.sum(), bool((predicting.argmax(axis=1) == continuation).all())


def likeliest_after(model, context, count):
    """Greedy continuation, from KerasHub's logits."""
    ids = list(context)
    for _ in range(count):
        ids.append(int(keras_hub_logits(model, ids)[-1].argmax()))
    return ids[len(context) :]


def assert_equal_to_keras_hub(model, pairs, **arguments):
    for pair, found in zip(pairs, log_likelihoods(model, pairs, **arguments), strict=True):
        log_prob, is_greedy = by_definition(model, pair, **arguments)
        assert abs(found.log_prob - log_prob) < TOLERANCE and found.is_greedy == is_greedy


@pytest.mark.slow
def test_equal_to_the_logits_of_keras_hub(tiny, rng):
    model = tiny()
    pairs = random_pairs(rng, [(5, 1), (30, 12), (1, 7), (17, 3)])
    context = pairs[1][0]
    greedy = likeliest_after(model, context, 2)
    # Choices after one context: equal texts, beginnings of others, and the greedy one.
    pairs += [(context, [40]), (context, [41]), (context, [40, 50]), (context, greedy), (context, [*greedy[:1], 3])]
    assert_equal_to_keras_hub(model, pairs)
    assert [each.is_greedy for each in log_likelihoods(model, pairs)].count(True) == 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gemma", "gemma2", "gemma4", "lora", "int8", "nf4", "bfloat16 control"])
def test_of_every_family_and_of_changed_models(tiny, rng, variant):
    """A negative control: bfloat16 differs by far more than the tolerance."""
    quant_spec = QuantSpec(variant, 32) if variant in ("int8", "nf4") else None
    precision = "bfloat16" if "control" in variant else "float32"
    model = tiny(variant if variant.startswith("gemma") else "gemma3", quant_spec=quant_spec, precision=precision)
    pairs = random_pairs(rng, [(5, 1), (30, 12), (1, 7), (17, 3), (100, 40)])
    before = [each.log_prob for each in log_likelihoods(model, pairs)]
    if variant == "lora":
        enable_lora(model.backbone, rank=4, alpha=8.0, target_layers=("all-linear",), seed=0)
        for variable in model.backbone.trainable_variables:
            variable.assign(rng.normal(size=variable.shape) * 0.05)
        after = [each.log_prob for each in log_likelihoods(model, pairs)]
        assert np.abs(np.subtract(before, after)).max() > 0.01
    if "control" in variant:
        exact = tiny("gemma3")
        assert max(abs(by_definition(exact, pair)[0] - found) for pair, found in zip(pairs, before, strict=True)) > 1e-3
    else:
        assert_equal_to_keras_hub(model, pairs)


@pytest.mark.slow
def test_shared_beginnings_change_nothing(tiny, rng, family):
    """Questions after the same examples, with choices of several tokens; longer than the window of most layers."""
    model = tiny(family)
    examples = [BOS, *rng.integers(10, 250, 70).tolist()]
    questions = [rng.integers(10, 250, size).tolist() for size in (9, 20)]
    choices = [rng.integers(10, 250, size).tolist() for size in (40, 3, 1, 12)]
    pairs = [(examples + question, choice) for question in questions for choice in choices]
    pairs += [(examples + questions[0] + choices[0], choices[3]), (examples, questions[1])]
    assert_equal_to_keras_hub(model, pairs)
    apart = [log_likelihoods(model, [pair])[0].log_prob for pair in pairs]
    together = [each.log_prob for each in log_likelihoods(model, pairs)]
    assert np.allclose(apart, together, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_long_contexts_lose_their_beginning_and_the_model_is_left_as_it_was(tiny, rng):
    model = tiny()
    pairs = random_pairs(rng, [(50, 3), (10, 16), (16, 1)])
    assert_equal_to_keras_hub(model, pairs, max_length=16)
    layers = [model.backbone, *model.backbone.layers]
    before = [(type(layer), dict(vars(layer))) for layer in layers]
    log_likelihoods(model, pairs, max_length=16)
    assert [(type(layer), dict(vars(layer))) for layer in layers] == before
    with pytest.raises(DataError, match="Pair 1: the continuation has 17 tokens; max_length is 16"):
        log_likelihoods(model, [pairs[0], ([BOS], [9] * 17)], max_length=16)
    with pytest.raises(DataError, match="Pair 0: the context has no token"):
        log_likelihoods(model, [([], [5])])
    assert log_likelihoods(model, []) == []


@pytest.mark.slow
def test_windows_of_a_long_text_predict_each_token_once(tiny, rng):
    """The windows of lm-eval's documentation: the last one has as much context as fits."""
    model, length = tiny(), 8
    scorer = LogLikelihoodScorer(model, max_length=length)
    texts = [rng.integers(10, 250, size).tolist() for size in (20, 8, 3, 0)]
    wanted = []
    for text in texts:
        ids = [BOS, *text]
        windows = [(ids[max(0, end - length) : start + 1], ids[start + 1 : end + 1]) for start, end in
                   [(start, min(start + length, len(text))) for start in range(0, len(text), length)]]  # fmt: skip
        assert all(len(context) + len(rest) - 1 <= length for context, rest in windows)
        wanted.append(sum(by_definition(model, window)[0] for window in windows))
    assert np.allclose(scorer.score_rolling(texts, BOS), wanted, rtol=0, atol=TOLERANCE)


def visible_to_targets(found):
    """Returns pair -> [(tokens that the target's place sees, their positions, target)], from the batches alone."""
    seen = {}
    for batch, of_pairs in found:
        num_parts, length = len(of_pairs), batch.token_ids.shape[1]
        token_ids, positions, ends = (field.reshape(num_parts, -1, length) for field in batch[:3])
        for part, target in zip(*np.nonzero(of_pairs >= 0), strict=True):
            row, place = divmod(batch.places[part, target], length)
            sees = np.flatnonzero((np.arange(length) <= place) & (ends[part, row] > place))
            what = token_ids[part, row, sees].tolist(), positions[part, row, sees].tolist()
            seen.setdefault(int(of_pairs[part, target]), []).append((*what, int(batch.target_ids[part, target])))
    return seen


def assert_each_target_once_after_its_own_text(found, pairs):
    seen = visible_to_targets(found)
    for number, (context, continuation) in enumerate(pairs):
        texts = [[*context, *continuation[:count]] for count in range(len(continuation))]
        targets = zip(texts, continuation, strict=True)
        assert seen[number] == [(text, list(range(len(text))), target) for text, target in targets]


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("shares_prefixes", [True, False])
def test_few_shapes_little_padding_and_each_target_once(rng, num_parts, shares_prefixes):
    sizes = [(int(rng.integers(20, 120)), int(rng.integers(1, 20))) for _ in range(600)] + [(700, 5), (2000, 9)]
    pairs = random_pairs(rng, sizes)
    pairs += [(pairs[0][0], [choice]) for choice in (5, 6, 7, 8)]
    pairs += [(context, [*rest, 9]) for context, rest in pairs[1:50]]
    found = list(continuation_batches(pairs, 4096, num_parts, 2048, shares_prefixes))
    assert len({tuple(field.shape for field in batch) for batch, _ in found}) == 2  # Rows of 512 and of 3072.
    read = sum(int((batch.ends > 0).sum()) for batch, _ in found if batch.token_ids.shape[1] == 512)
    positions = sum(batch.token_ids.size for batch, _ in found if batch.token_ids.shape[1] == 512)
    assert read / positions > 0.9
    assert_each_target_once_after_its_own_text(found, pairs)
    if not shares_prefixes:  # Where a text ends tells it from others in its row, as segment ids do.
        for batch, _ in found:
            for row in batch.ends:
                (changes,) = np.nonzero(np.diff(row, append=-1))
                assert [end for end in row[changes].tolist() if end] == [at + 1 for at in changes.tolist() if row[at]]


def test_what_texts_begin_with_is_read_once(rng):
    """40 questions with four choices after five examples, as in MMLU or ARC with few shots."""
    examples, *questions = ([BOS, *rng.integers(10, 250, 60 if i else 400).tolist()] for i in range(41))
    pairs = [
        (examples + question, rng.integers(10, 250, size).tolist()) for question in questions for size in (1, 1, 6, 8)
    ]
    found = list(continuation_batches(pairs, 4096, 1, 2048))
    assert_each_target_once_after_its_own_text(found, pairs)
    num_rows = sum(len(batch.token_ids) for batch, _ in found)
    read = sum(int((batch.ends > 0).sum()) for batch, _ in found)
    assert num_rows < 10 and read <= num_rows * (400 + 60) + 40 * (60 + 5 + 7 + 2)
    apart = sum(int((batch.ends > 0).sum()) for batch, _ in continuation_batches(pairs, 4096, 1, 2048, False))
    assert apart > 7 * read
