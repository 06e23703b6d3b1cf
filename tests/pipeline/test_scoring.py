"""Evaluating a model leaves it as it was."""

import numpy as np
import pytest

import gemma_tune
from gemma_tune.evaluation.measure import target_states
from gemma_tune.models.attention.packing_masks import enable_packing
from gemma_tune.models.functional import parameters
from gemma_tune.models.layers import iter_layers
from gemma_tune.models.restored_layers import restored_layers
from gemma_tune.models.transforms import LoraSettings, transform_for_training
from gemma_tune.training.batches import HeldoutBatches


@pytest.fixture(scope="module")
def examples():
    return gemma_tune.load_examples("sample:smartphone_support")[:3]


def parts(model):
    """Everything that is swapped in a model: each layer's class and attributes, and each variable's array."""
    layers = [model.backbone, *iter_layers(model.backbone)]
    found = {(layer.path, name): value for layer in layers for name, value in vars(layer).items()}
    return [type(layer) for layer in layers], found, parameters(model)


def differences(after, before):
    """Names of what is another object. Not the objects: describing whole models would take pytest minutes."""
    changed = ["classes"] if after[0] != before[0] else []
    changed += [str(key) for key in after[1].keys() ^ before[1].keys()]
    changed += [str(key) for key, value in before[1].items() if key in after[1] and after[1][key] is not value]
    for now, then in zip(after[2], before[2], strict=True):
        changed += [path for path in now.keys() | then.keys() if now.get(path) is not then.get(path)]
    return changed


@pytest.mark.parametrize("is_transformed", [False, True], ids=["as loaded", "transformed for training"])
def test_evaluate_leaves_the_callers_model_as_it_was(tiny, examples, is_transformed):
    """The same objects, and the same outputs of KerasHub's own call."""
    model = tiny("gemma3")
    if is_transformed:
        lora = LoraSettings(2, 2.0, ("query",), 0)
        transform_for_training(model, lora, packing=True, remat="dots", row_length=64, program="whole")
    inputs = {"token_ids": np.arange(10, 20)[None], "padding_mask": np.ones((1, 10), np.int32)}
    inputs = {name: inputs[name] for name in model.backbone.input}
    outputs, before = np.asarray(model(inputs)), parts(model)
    first, second = (gemma_tune.evaluate(model, examples, max_length=64, batch_size=2) for _ in range(2))
    assert differences(parts(model), before) == []
    assert first == second and first["num_tokens"] > 0
    np.testing.assert_array_equal(model(inputs), outputs)


def test_target_states_leave_the_model_as_it_was(tiny, tiny_tokenizer, examples):
    from gemma_tune.data import template_for
    from gemma_tune.data.tokenize import tokenize_examples

    model = tiny("gemma2")
    tokens = tokenize_examples(examples, template_for("gemma2"), tiny_tokenizer, 64, "truncate").examples
    before = parts(model)
    target_states(model, HeldoutBatches(tokens, 2, 64, packing=True), lambda count: None)
    assert differences(parts(model), before) == []


def test_swapped_layers_come_back_after_an_error(tiny):
    """Negative control: without the context they stay swapped."""
    model = tiny("gemma3")
    before = parts(model)
    with pytest.raises(RuntimeError), restored_layers(model.backbone):
        enable_packing(model.backbone)
        model.backbone.transformer_layers[0].call = print
        model.backbone.transformer_layers[1].__class__ = type(
            "Other", (type(model.backbone.transformer_layers[1]),), {}
        )
        raise RuntimeError
    assert differences(parts(model), before) == []
    enable_packing(model.backbone)
    assert any("_compute_attention_mask" in name for name in differences(parts(model), before))
