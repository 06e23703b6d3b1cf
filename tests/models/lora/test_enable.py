"""Tests of enabling and merging LoRA on a backbone."""

import numpy as np
import pytest
from helpers.logits import logits
from helpers.lora import randomize_b

from gemma_tune.errors import ModelError
from gemma_tune.models.functional import parameters
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.lora.enable import enable_lora, merge_lora
from gemma_tune.models.sources.lazy_initialization import lazy_initialization
from gemma_tune.runtime.backend import keras_hub


def test_the_default_has_the_tutorials_parameter_count():
    """Gemma 2B at rank 4: 1,363,968, as the Keras tutorial on fine-tuning Gemma with LoRA prints."""
    with lazy_initialization():
        backbone = keras_hub.models.GemmaBackbone(
            vocabulary_size=256000,
            num_layers=18,
            num_query_heads=8,
            num_key_value_heads=1,
            hidden_dim=2048,
            intermediate_dim=32768,
            head_dim=256,
        )
        enable_lora(backbone, 4, 4.0, ("query", "value"), seed=0)
    assert sum(int(np.prod(variable.shape)) for variable in backbone.trainable_variables) == 1_363_968


def test_it_changes_nothing_at_the_start(tiny, family, rng):
    model = tiny(family)
    before = logits(model)
    enable_lora(model.backbone, 4, 8.0, ("all-linear",), seed=0)
    # The low-rank path adds exact zeros, but the products around it may be ordered otherwise: some roundings of
    # float32 (6e-8 of values up to 5) through four blocks. A factor that isn't zero moves logits by more than 1e-2.
    np.testing.assert_allclose(logits(model), before, atol=1e-4)
    randomize_b(model, rng)
    assert np.abs(logits(model) - before).max() > 1e-2


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("attention",), {"query", "key", "value", "attention_output"}),
        (("all-linear",), {"query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"}),
        (("key", "ffw_linear"), {"key", "ffw_linear"}),
        (("token_embedding",), {"token_embedding"}),
    ],
)
def test_targets(tiny, targets, names):
    model = tiny("gemma3")
    enable_lora(model.backbone, 2, 2.0, targets, seed=0)
    assert {layer.name for layer in lora_layers(model.backbone)} == names
    trainable = parameters(model).trainable
    assert trainable and all("lora_" in path for path in trainable)


def test_unknown_targets_list_those_there(tiny):
    with pytest.raises(
        ModelError,
        match=r"target_layers=querry. Did you mean query\? Layers: .*ffw_linear.*Groups: attention, all-linear",
    ):
        enable_lora(tiny().backbone, 2, 2.0, ("querry", "value"), seed=0)


def test_lora_is_enabled_once(tiny):
    model = tiny()
    enable_lora(model.backbone, 2, 2.0, ("query",), seed=0)
    with pytest.raises(ModelError, match="already enabled"):
        enable_lora(model.backbone, 2, 2.0, ("query",), seed=0)


def test_the_seed_decides_the_first_factors(tiny):
    factors = []
    for seed in (0, 0, 1):
        model = tiny()
        enable_lora(model.backbone, 2, 2.0, ("query",), seed=seed)
        factors.append(
            {path: np.asarray(value) for path, value in parameters(model).trainable.items() if path.endswith("_a")}
        )
    assert all(np.array_equal(factors[0][path], factors[1][path]) for path in factors[0])
    assert not any(np.array_equal(factors[0][path], factors[2][path]) for path in factors[0])


@pytest.mark.parametrize("targets", [("all-linear",), ("token_embedding", "value")])
def test_merging_changes_nothing_and_lora_can_be_enabled_anew(tiny, family, rng, targets):
    model = tiny(family)
    num_trainable = len(parameters(model).trainable)
    enable_lora(model.backbone, 3, 6.0, targets, seed=0)
    randomize_b(model, rng)
    before = logits(model)
    merge_lora(model.backbone)
    np.testing.assert_allclose(logits(model), before, atol=2e-4)
    assert not lora_layers(model.backbone) and len(parameters(model).trainable) == num_trainable
    enable_lora(model.backbone, 2, 2.0, ("query",), seed=0)
    np.testing.assert_allclose(logits(model), before, atol=2e-4)


def test_dora_on_the_embedding_is_refused(tiny):
    with pytest.raises(ModelError, match="can't have DoRA factors: a tied embedding"):
        enable_lora(tiny().backbone, 2, 2.0, ("token_embedding",), 0, "peft", use_dora=True)
