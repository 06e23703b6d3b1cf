"""Tests of saving and loading adapters: they come back as they were, and refuse another base model."""

import numpy as np
import pytest
from helpers.logits import logits
from helpers.lora import methods, randomize_b, with_lora

from gemma_tune.errors import ModelError
from gemma_tune.models.base_fingerprint import fingerprint
from gemma_tune.models.lora.adapter import load_adapter, read_adapter_metadata, save_adapter
from gemma_tune.models.lora.enable import enable_on_layers, lora_specs
from gemma_tune.models.lora.factors import (
    LoraSpec,
)

KERNELS, EMBEDDING = ("query", "ffw_linear"), ("token_embedding", "value")


@pytest.mark.parametrize(
    ("file", "targets"), [("adapter", KERNELS), ("a.safetensors", EMBEDDING), ("a.lora.h5", KERNELS)]
)
def test_saved_and_loaded_it_gives_the_same_logits(tiny, family, rng, tmp_path, file, targets):
    model = with_lora(tiny(family), rng, {}, targets)
    before = logits(model)
    save_adapter(model, tmp_path / file, "tiny")
    np.testing.assert_allclose(logits(model), before, atol=0)  # Saving changes nothing.
    again = tiny(family)
    load_adapter(again, tmp_path / file)
    np.testing.assert_allclose(logits(again), before, atol=1e-4)


def test_metadata_says_what_it_belongs_to(tiny, rng, tmp_path):
    model = with_lora(tiny("gemma2"), rng, {}, KERNELS)
    save_adapter(model, tmp_path, "tiny:gemma2")
    metadata = read_adapter_metadata(tmp_path)
    assert metadata["family"] == "gemma2" and metadata["base_model"] == "tiny:gemma2"
    assert (metadata["rank"], float(metadata["alpha"]), metadata["target_layers"]) == (
        "3",
        6.0,
        '["ffw_linear", "query"]',
    )
    assert metadata["base_fingerprint"] == fingerprint(tiny("gemma2"))


def test_another_base_is_refused(tiny, rng, tmp_path):
    save_adapter(with_lora(tiny("gemma3"), rng, {}, KERNELS), tmp_path, "tiny:gemma3")
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


@methods
def test_adapters_keep_what_they_are(tiny, rng, tmp_path, method):
    model = with_lora(tiny("gemma3"), rng, method)
    save_adapter(model, tmp_path, "tiny")
    metadata = read_adapter_metadata(tmp_path)
    assert metadata["layout"] == method["layout"] and "layers" not in metadata
    again = tiny("gemma3")
    load_adapter(again, tmp_path)
    assert lora_specs(again.backbone) == lora_specs(model.backbone)
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-5)


def test_adapters_keep_factors_of_several_kinds(tiny, rng, tmp_path):
    model = tiny("gemma3")
    first, second = (block.attention.query_dense.path for block in model.backbone.transformer_layers[:2])
    kinds = {first: LoraSpec("peft", 2, 3.0), second: LoraSpec("peft", 5, 5.5)}
    enable_on_layers(model.backbone, kinds, 0)
    randomize_b(model, rng)
    save_adapter(model, tmp_path, "tiny")
    again = tiny("gemma3")
    load_adapter(again, tmp_path)
    assert lora_specs(again.backbone) == kinds
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-5)


def test_files_of_before_layouts_still_load(tiny, rng, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    model = with_lora(tiny("gemma3"), rng, {})
    file = save_adapter(model, tmp_path, "tiny")
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    for name in ("layout", "use_rslora", "use_dora", "sha256"):
        del metadata[name]
    save_file(load_file(file), file, metadata)
    again = tiny("gemma3")
    load_adapter(again, tmp_path)
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-5)
