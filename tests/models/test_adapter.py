"""Tests of saving and loading adapters: they come back as they were, and refuse another base model."""

import numpy as np
import pytest
from models.test_lora import logits, random_second_factors

from gemma_tune.errors import ModelError
from gemma_tune.models.base_fingerprint import fingerprint
from gemma_tune.models.lora.adapter import load_adapter, read_adapter_metadata, save_adapter
from gemma_tune.models.lora.enable import enable_lora


def tuned(model, rng, targets=("query", "ffw_linear"), alpha=6.0):
    enable_lora(model.backbone, 3, alpha, targets, seed=0)
    random_second_factors(model, rng)
    return model


KERNELS, EMBEDDING = ("query", "ffw_linear"), ("token_embedding", "value")


@pytest.mark.parametrize(
    ("file", "targets"), [("adapter", KERNELS), ("a.safetensors", EMBEDDING), ("a.lora.h5", KERNELS)]
)
def test_saved_and_loaded_it_gives_the_same_logits(tiny, family, rng, tmp_path, file, targets):
    model = tuned(tiny(family), rng, targets)
    before = logits(model)
    save_adapter(model, tmp_path / file, "tiny")
    np.testing.assert_allclose(logits(model), before, atol=0)  # Saving changes nothing.
    again = tiny(family)
    load_adapter(again, tmp_path / file)
    np.testing.assert_allclose(logits(again), before, atol=1e-4)


def test_keras_hubs_h5_has_no_place_for_the_embedding(tiny, rng, tmp_path):
    with pytest.raises(ModelError, match="holds LoRA on kernels only, not on the embedding. Save as .safetensors"):
        save_adapter(tuned(tiny(), rng, EMBEDDING), tmp_path / "a.lora.h5")


def test_keras_hub_reads_our_h5(tiny, rng, tmp_path):
    model = tuned(tiny("gemma3"), rng, ("query", "value"), alpha=12.0)
    path = save_adapter(model, tmp_path / "mine.lora.h5")
    theirs = tiny("gemma3")
    theirs.backbone.load_lora_weights(str(path))  # KerasHub's own: default targets, scale 1.
    np.testing.assert_allclose(logits(theirs), logits(model), atol=2e-4)


def test_we_read_keras_hubs_h5(tiny, rng, tmp_path):
    theirs = tiny("gemma3")
    theirs.backbone.enable_lora(2, target_layer_names=["key", "ffw_gating"])
    random_second_factors(theirs, rng)
    theirs.backbone.save_lora_weights(str(tmp_path / "theirs.lora.h5"))
    model = tiny("gemma3")
    load_adapter(model, tmp_path / "theirs.lora.h5")
    np.testing.assert_allclose(logits(model), logits(theirs), atol=2e-4)


def test_metadata_says_what_it_belongs_to(tiny, rng, tmp_path):
    model = tuned(tiny("gemma2"), rng)
    save_adapter(model, tmp_path, "tiny:gemma2")
    metadata = read_adapter_metadata(tmp_path)
    assert metadata["family"] == "gemma2" and metadata["base_model"] == "tiny:gemma2"
    assert (metadata["rank"], float(metadata["alpha"]), metadata["target_layers"]) == (
        "3",
        6.0,
        '["ffw_linear", "query"]',
    )
    assert metadata["base_fingerprint"] == fingerprint(tiny("gemma2"))


def test_the_fingerprint_is_the_bases_not_the_precisions(tiny, rng):
    base = fingerprint(tiny("gemma3"))
    assert fingerprint(tiny("gemma3", precision="bfloat16")) == base
    assert fingerprint(tuned(tiny("gemma3"), rng)) == base
    assert len({base, fingerprint(tiny("gemma3", seed=1)), fingerprint(tiny("gemma"))}) == 3


def test_another_base_is_refused(tiny, rng, tmp_path):
    save_adapter(tuned(tiny("gemma3"), rng), tmp_path, "tiny:gemma3")
    with pytest.raises(
        ModelError, match=r"was trained on another base model: tiny:gemma3 \(gemma3, weights .*This model is gemma with"
    ):
        load_adapter(tiny("gemma"), tmp_path)


def test_what_is_no_adapter_is_refused(tiny, write, tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(ModelError, match="There is no adapter at"):
        load_adapter(tiny(), tmp_path / "none")
    with pytest.raises(ModelError, match="can't be read as an adapter"):
        load_adapter(tiny(), write("x.safetensors", "no"))
    with pytest.raises(ModelError, match="can't be read as KerasHub LoRA weights"):
        load_adapter(tiny(), write("x.lora.h5", "no"))
    save_file({"a": np.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="is not an adapter of gemma_tune"):
        load_adapter(tiny(), tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="no LoRA factors to save"):
        save_adapter(tiny(), tmp_path)
