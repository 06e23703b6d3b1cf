"""PEFT adapters without PEFT: what is written comes back, and what can't be had is refused. With PEFT: tests/peers."""

import json

import numpy as np
import pytest
from helpers.logits import logits
from helpers.lora import METHODS, with_lora
from safetensors.numpy import load_file, save_file

from gemma_tune.errors import ModelError
from gemma_tune.export import export_model
from gemma_tune.export.options import ExportOptions
from gemma_tune.export.peft.adapter import can_be_peft, write_peft_adapter
from gemma_tune.export.writers import peft_base_name
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.lora.adapter import load_adapter
from gemma_tune.models.lora.enable import enable_on_layers, lora_specs
from gemma_tune.models.lora.factors import LoraSpec
from gemma_tune.models.lora.layers import equation_of, factors_of, lora_spec_of
from gemma_tune.models.lora.layouts import as_matrices, to_peft
from gemma_tune.models.lora.peft_import import peft_base
from gemma_tune.models.lora.peft_names import family_in_name, layers_by_module, module_prefix
from gemma_tune.models.sources.source import parse_source

ALL = ("all-linear", "token_embedding")


def written(model, folder, base="tiny"):
    folder.mkdir(exist_ok=True)
    write_peft_adapter(model, folder, base)
    return folder


def settings(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture
def adapter(tiny, rng, tmp_path):
    return written(with_lora(tiny("gemma3"), rng, {"layout": "peft"}, ("attention",)), tmp_path / "adapter")


def change(folder, **changes):
    (folder / "adapter_config.json").write_text(json.dumps({**settings(folder), **changes}))
    return folder


@pytest.mark.parametrize("method", [METHODS["peft"], {"layout": "keras"}, METHODS["keras-rslora-dora"]], ids=str)
def test_what_is_written_comes_back(tiny, some_family, rng, tmp_path, method):
    model = with_lora(tiny(some_family), rng, method, ALL[:1] if method.get("use_dora") else ALL)
    again = tiny(some_family)
    load_adapter(again, written(model, tmp_path / "a"))
    np.testing.assert_allclose(logits(again), logits(model), atol=2e-4)
    ours, theirs = lora_specs(model.backbone), lora_specs(again.backbone)
    assert ours.keys() == theirs.keys()
    for path, kind in theirs.items():
        assert kind.layout == "peft" and kind.scale == pytest.approx(ours[path].scale)


def test_settings_of_pefts_layout(adapter):
    said = settings(adapter)
    assert said["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert (said["r"], said["lora_alpha"], said["rank_pattern"], said["alpha_pattern"]) == (3, 6, {}, {})
    shapes = {name: value.shape for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    start = "base_model.model.model.layers.0.self_attn"
    assert shapes[f"{start}.q_proj.lora_A.weight"] == (3, 64) and shapes[f"{start}.q_proj.lora_B.weight"] == (64, 3)
    assert shapes[f"{start}.o_proj.lora_A.weight"] == (3, 64) and len(shapes) == 48


def test_settings_of_kerass_layout(tiny, rng, tmp_path):
    """Queries have four heads and keys one: rank 12 and 3, with an alpha that keeps the scale."""
    said = settings(written(with_lora(tiny("gemma3"), rng, {"use_rslora": True}, ("query", "key")), tmp_path / "a"))
    assert said["use_rslora"] and not said["use_dora"]
    ranks = {said["r"], *said["rank_pattern"].values()}
    alphas = {said["lora_alpha"], *said["alpha_pattern"].values()}
    assert ranks == {3, 12} and alphas == {6, 12}  # 6·sqrt(12/3).
    assert said["rank_pattern"].keys() == said["alpha_pattern"].keys() <= {"q_proj", "k_proj"}


def test_single_layers_have_full_names(tiny, tmp_path):
    model = tiny("gemma3")
    path = model.backbone.transformer_layers[2].attention.query_dense.path
    enable_on_layers(model.backbone, {path: LoraSpec("peft", 2, 2.0)}, 0)
    assert settings(written(model, tmp_path / "a"))["target_modules"] == ["model.layers.2.self_attn.q_proj"]
    # The same modules in a model that also sees, whose other attention has the same short names.
    said = settings(written(model, tmp_path / "b", "google/gemma-3-4b-it"))
    assert said["target_modules"] == ["model.language_model.layers.2.self_attn.q_proj"]


def test_names_of_bases(tmp_path):
    assert module_prefix("google/gemma-3-27b-it") == module_prefix("google/gemma-4-E2B") == "model.language_model."
    assert module_prefix("google/gemma-3-270m") == module_prefix("google/gemma-2-9b-it") == "model."
    (tmp_path / "config.json").write_text('{"model_type": "gemma3", "text_config": {}}')
    assert module_prefix(str(tmp_path)) == "model.language_model."
    names = {
        "google/gemma-2b-it": "gemma",
        "google/gemma-2-2b": "gemma2",
        "unsloth/gemma-3-1b-it": "gemma3",
        "me/mine": "",
    }
    assert {name: family_in_name(name) for name in names} == names


def test_without_lora_there_is_nothing_to_write(tiny, tmp_path):
    assert "no LoRA factors" in can_be_peft(tiny())
    with pytest.raises(ModelError, match="no LoRA factors"):
        write_peft_adapter(tiny(), tmp_path, "tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft_type": "PREFIX_TUNING"},
            "peft_type is 'PREFIX_TUNING'. gemma_tune reads only PEFT adapters of type LORA",
        ),
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'"),
        ({"bias": "all"}, "bias is 'all', which gemma_tune doesn't support"),
        ({"modules_to_save": ["lm_head"]}, r"it sets modules_to_save=\['lm_head'\]"),
        ({"use_qalora": True}, "it sets use_qalora=True"),
        ({"kasa_config": {"beta": 1}}, "it sets kasa_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"r": 5}, "should have rank 5, but its lora_A has rank 3"),
        ({"r": "x"}, r"is damaged: it has r=\['x'\]"),
        ({"lora_alpha": 0}, r"is damaged: it has r=\[3\] and lora_alpha=\[0\]"),
        ({"rank_pattern": ["q"]}, "is damaged"),
        ({"rank_pattern": {"(": 3}}, "is damaged"),
        ({"use_dora": True}, "the magnitudes of .* don't match use_dora=True"),
        ({"base_model_name_or_path": "google/gemma-2-2b"}, "another base model, google/gemma-2-2b, which is gemma2"),
        ({"target_modules": ["q_proj", "up_proj"]}, "lacks the factors of layers.0.mlp.up_proj and 5 other modules"),
    ],
    ids=str,
)
def test_settings_that_are_refused(tiny, adapter, changes, message):
    model = tiny("gemma3")
    with pytest.raises(ModelError, match=message):
        load_adapter(model, change(adapter, **changes))
    assert not lora_specs(model.backbone)


def test_pefts_own_defaults_are_taken(tiny, adapter):
    """What PEFT writes besides, where it says nothing."""
    quiet = {"auto_mapping": None, "alora_invocation_tokens": None, "layers_to_transform": None, "loftq_config": {}, "lora_dropout": 0.05,
             "megatron_core": "megatron.core", "qalora_group_size": 16, "runtime_config": {"a": False}, "trainable_token_indices": None}  # fmt: skip
    load_adapter(tiny("gemma3"), change(adapter, **quiet, base_model_name_or_path="google/gemma-3-270m"))


def test_factors_in_bfloat16_are_read(tiny, adapter):
    import ml_dtypes

    file = adapter / "adapter_model.safetensors"
    save_file({name: value.astype(ml_dtypes.bfloat16) for name, value in load_file(file).items()}, file)
    model, exact = tiny("gemma3"), tiny("gemma3")
    load_adapter(model, adapter)
    assert {variable.dtype for variable in model.backbone.trainable_variables} == {"float32"}
    assert np.abs(logits(model) - logits(exact)).max() > 0.1


def test_another_base_is_refused(tiny, rng, adapter, tmp_path):
    with pytest.raises(
        ModelError,
        match="it has factors for model.layers.3.self_attn.._proj, but this gemma with 3 decoder blocks",
    ):
        load_adapter(tiny("gemma"), adapter)
    of_gemma2 = written(with_lora(tiny("gemma2"), rng, {"layout": "peft"}, ("key",)), tmp_path / "two", "")
    with pytest.raises(
        ModelError,
        match=r"another base model: the factors of model.layers.0.self_attn.k_proj have .* but the kernel of .*key has",
    ):
        load_adapter(tiny("gemma3"), of_gemma2)


def test_damaged_files_are_refused(tiny, adapter, write):
    file = adapter / "adapter_model.safetensors"
    tensors, first = load_file(file), "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    cases = {
        "is damaged: lora_A of .* has values that are not finite": {**tensors, first: tensors[first] * np.nan},
        "is damaged: .*q_proj has the tensors lora_B": {k: v for k, v in tensors.items() if k != first},
        "has a tensor 'x', which is not a LoRA factor": {**tensors, "x": tensors[first]},
        "factors for embed_tokens": {**tensors, "base_model.model.model.embed_tokens.lora_embedding_A": tensors[first]},
    }
    for message, changed in cases.items():
        save_file(changed, file)
        with pytest.raises(ModelError, match=message):
            load_adapter(tiny("gemma3"), adapter)
    file.write_bytes(b"no")
    with pytest.raises(ModelError, match="can't be read as safetensors"):
        load_adapter(tiny("gemma3"), adapter)
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="has no adapter_model.safetensors. adapter_model.bin is a pickle"):
        load_adapter(tiny("gemma3"), adapter)


def test_a_source_that_is_an_adapter(adapter):
    from gemma_tune.models.load import load_model

    assert parse_source(str(adapter)).kind == "peft"
    with pytest.raises(ModelError, match="names no base model. Pass the base model as the model"):
        load_model(str(change(adapter, base_model_name_or_path=None)))
    with pytest.raises(ModelError, match="names /gone as its base model, which doesn't exist"):
        load_model(str(change(adapter, base_model_name_or_path="/gone")))


def test_the_source_of_an_adapter_that_was_moved_with_its_base(adapter, tmp_path, monkeypatch):
    """A relative base is looked for beside the adapter too; a name without an owner is on no hub."""
    base = tmp_path / "my-base"
    base.mkdir()
    change(adapter, base_model_name_or_path="my-base")
    assert peft_base(adapter) == str(base)
    monkeypatch.chdir(base)
    assert peft_base(adapter) == str(base)
    assert peft_base(change(adapter, base_model_name_or_path="me/mine")) == "hf://me/mine"
    with pytest.raises(ModelError, match="names other-base as its base model, which doesn't exist"):
        peft_base(change(adapter, base_model_name_or_path="other-base"))


def simple_updates(folder):
    """The update of each weight for a reader that knows r and lora_alpha alone, as vLLM's peft_helper.py does."""
    said, tensors = settings(folder), load_file(folder / "adapter_model.safetensors")
    scale = said["lora_alpha"] / (said["r"] ** 0.5 if said["use_rslora"] else said["r"])
    firsts = [name for name in tensors if "lora_A" in name]
    assert max(len(tensors[name]) for name in firsts) == said["r"]
    return {name: scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name] for name in firsts}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_reader_of_r_and_alpha_alone_computes_the_same(tiny, rng, tmp_path, use_rslora):
    """Ranks differ from module to module in Keras's layout, and here scales too; PEFT itself sees the same updates."""
    model = with_lora(tiny("gemma3"), rng, {"use_rslora": use_rslora}, ("query", "key", "ffw_gating"))
    layers = {layer.path: lora_spec_of(layer) for layer in lora_layers(model.backbone)}
    path = next(path for path in layers if "key" in path)
    values = {
        layer.path: [np.asarray(each.value) for each in factors_of(layer)] for layer in lora_layers(model.backbone)
    }
    again = tiny("gemma3")
    enable_on_layers(again.backbone, {**layers, path: layers[path]._replace(alpha=2.5)}, 0)
    for layer in lora_layers(again.backbone):
        for factor, value in zip(factors_of(layer), values[layer.path], strict=True):
            factor.assign(value)
    updates = simple_updates(written(again, tmp_path / "a"))
    assert len({spec.scale for spec in lora_specs(again.backbone).values()}) == 2  # So the case is there.
    for layer in lora_layers(again.backbone):
        module = next(name for name, one in layers_by_module(again.backbone).items() if one is layer)
        spec, a, b = to_peft(equation_of(layer), lora_spec_of(layer), *(np.asarray(f.value) for f in factors_of(layer)))
        low, high = as_matrices(a, b)
        found = next(value for name, value in updates.items() if f".{module}." in name)
        np.testing.assert_allclose(found, spec.scale * high @ low, rtol=1e-5, atol=1e-7)
    back = tiny("gemma3")
    load_adapter(back, tmp_path / "a")
    np.testing.assert_allclose(logits(back), logits(again), atol=2e-4)


def test_factors_of_one_scale_are_written_unchanged(tiny, rng, tmp_path):
    model = with_lora(tiny("gemma3"), rng, {"layout": "peft"}, ("query",))
    layer = lora_layers(model.backbone)[0]
    low, high = as_matrices(*(np.asarray(factor.value) for factor in factors_of(layer)))
    tensors = load_file(written(model, tmp_path / "a") / "adapter_model.safetensors")
    start = "base_model.model.model.layers.0.self_attn.q_proj"
    np.testing.assert_array_equal(tensors[f"{start}.lora_A.weight"], low)
    np.testing.assert_array_equal(tensors[f"{start}.lora_B.weight"], high)


def exported(model, folder, base):
    done = export_model(model, "peft", folder, options=ExportOptions(base_name=base))
    return settings(folder), (folder / "README.md").read_text(), done


@pytest.mark.parametrize(("rank", "promised"), [(2, 8), (3, 16), (10, 64), (200, 0)])
def test_the_card_gives_vllm_a_rank_that_it_takes(tiny, rng, tmp_path, rank, promised):
    """--max-lora-rank takes a few values alone, up to 512. Queries have four heads: rank 4·R."""
    model = with_lora(tiny("gemma3"), rng, {"layout": "keras"}, ("query", "value"), rank)
    said, card, done = exported(model, tmp_path / "a", "gemma3_270m")
    assert said["r"] == 4 * rank and said["base_model_name_or_path"] == "google/gemma-3-270m"
    if promised:
        assert f"vllm serve google/gemma-3-270m --enable-lora --max-lora-rank={promised} " in card
    else:
        assert "vllm serve" not in card and "its largest rank is 512, and this one has 800" in " ".join(done.notes)


@pytest.mark.parametrize(
    ("method", "targets", "reason"),
    [
        ({"layout": "peft", "use_dora": True}, ("attention",), "it knows no DoRA"),
        ({"layout": "peft"}, ("query", "token_embedding"), "no LoRA on Gemma's embedding"),
    ],
)
def test_the_card_promises_vllm_nothing_that_it_refuses(tiny, rng, tmp_path, method, targets, reason):
    _, card, done = exported(with_lora(tiny("gemma3"), rng, method, targets), tmp_path / "a", "gemma3_270m")
    assert "vllm serve" not in card and reason in card and reason in " ".join(done.notes)
    assert "PeftModel" in card and done.next == f"gemma-tune chat --model=gemma3_270m --adapter={tmp_path / 'a'}"


def test_the_base_that_is_named_can_be_loaded_from_elsewhere(tiny, rng, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_model(tiny("gemma3"), "hf", "base hf")
    export_model(tiny("gemma3"), "keras", "base keras")
    model = with_lora(tiny("gemma3"), rng, {"layout": "peft"}, ("query",))
    said, card, done = exported(model, tmp_path / "a", "base hf")
    assert said["base_model_name_or_path"] == str(tmp_path / "base hf")
    assert f"names {tmp_path}/base hf as the base model" in done.notes[0] and f"vllm serve '{tmp_path}/base hf'" in card
    for number, base in enumerate(("base keras", "tiny")):  # No program but ours reads these.
        said, card, done = exported(model, tmp_path / f"b{number}", base)
        assert said["base_model_name_or_path"] is None
        word = f"'{base}'" if " " in base else base
        assert f"gemma-tune export --model={word} --format=hf --output=base-hf" in done.notes[0]
        assert 'from_pretrained("base-hf")' in card
    assert peft_base_name("me/mine") == peft_base_name("hf://me/mine") == "me/mine"
    assert peft_base_name("") == peft_base_name("nowhere") == peft_base_name("../nowhere") == ""
