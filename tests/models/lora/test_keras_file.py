"""Tests of KerasHub's `.lora.h5` files, in both directions."""

import numpy as np
import pytest
from helpers.logits import logits
from helpers.lora import METHODS, randomize_b, with_lora

from gemma_tune.errors import ModelError
from gemma_tune.models.lora.adapter import load_adapter, save_adapter


def test_keras_hubs_h5_has_no_place_for_the_embedding(tiny, rng, tmp_path):
    with pytest.raises(ModelError, match="holds LoRA on kernels only, not on the embedding. Save as .safetensors"):
        save_adapter(with_lora(tiny(), rng, {}, ("token_embedding", "value")), tmp_path / "a.lora.h5")


def test_keras_hub_reads_our_h5(tiny, rng, tmp_path):
    model = with_lora(tiny("gemma3"), rng, {}, ("query", "value"), alpha=12.0)
    path = save_adapter(model, tmp_path / "mine.lora.h5")
    theirs = tiny("gemma3")
    theirs.backbone.load_lora_weights(str(path))  # KerasHub's own: default targets, scale 1.
    np.testing.assert_allclose(logits(theirs), logits(model), atol=2e-4)


def test_we_read_keras_hubs_h5(tiny, rng, tmp_path):
    theirs = tiny("gemma3")
    theirs.backbone.enable_lora(2, target_layer_names=["key", "ffw_gating"])
    randomize_b(theirs, rng)
    theirs.backbone.save_lora_weights(str(tmp_path / "theirs.lora.h5"))
    model = tiny("gemma3")
    load_adapter(model, tmp_path / "theirs.lora.h5")
    np.testing.assert_allclose(logits(model), logits(theirs), atol=2e-4)


def test_what_h5_has_no_place_for(tiny, rng, tmp_path):
    for method, reason in (
        (METHODS["peft"], "lora.layout=keras only"),
        (METHODS["keras-rslora-dora"], "no magnitudes"),
    ):
        with pytest.raises(ModelError, match=reason):
            save_adapter(with_lora(tiny(), rng, method), tmp_path / "a.lora.h5")
    model = with_lora(tiny("gemma3"), rng, {"use_rslora": True}, ("query", "value"))
    theirs = tiny("gemma3")
    theirs.backbone.load_lora_weights(str(save_adapter(model, tmp_path / "b.lora.h5")))
    np.testing.assert_allclose(logits(theirs), logits(model), atol=2e-4)  # Its scale is in B.
