"""Hugging Face directories, read back by the safetensors library and by our own reader. transformers: tests/peers."""

import json

import numpy as np
import pytest
from helpers.variants import shake
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gemma_tune.data import Turn, template_for
from gemma_tune.errors import ModelError
from gemma_tune.export import export_model
from gemma_tune.export.hf import tensors
from gemma_tune.export.hf.config import hf_config
from gemma_tune.export.hf.tensors import tensors_of
from gemma_tune.export.jinja_template import jinja_template
from gemma_tune.export.options import ExportOptions
from gemma_tune.models.functional import variables_by_path
from gemma_tune.models.layers import quantized_layers
from gemma_tune.models.load import load_model
from gemma_tune.models.quantized.convert import quantize_layers
from gemma_tune.models.sources.hf_checkpoint import ports
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.quantization.codes import dequantize
from gemma_tune.quantization.spec import QuantSpec


def read(folder):
    from safetensors.numpy import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def values_of(model):
    return {path: np.asarray(variable.value) for path, variable in variables_by_path(model).items()}


def test_it_is_read_back_bit_for_bit(tiny, family, rng, tmp_path):
    model = tiny(family)
    shake(model, rng)
    before = values_of(model)
    export_model(model, "hf", tmp_path / "hf", options=ExportOptions(max_shard_size="200KB"))
    again = load_model(str(tmp_path / "hf"))
    assert set(before) == set(values_of(again))
    for path, value in values_of(again).items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    tensors = read(tmp_path / "hf")
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    for file in set(index["weight_map"].values()):
        inside = [name for name, where in index["weight_map"].items() if where == file]
        assert sum(tensors[name].nbytes for name in inside) <= 200_000 or len(inside) == 1
    assert tokenizer_of(again).proto == tokenizer_of(model).proto


def test_both_ends_of_an_answer_are_in_both_files(tiny, family, tmp_path):
    """Readers that know config.json alone would go on after the end of a turn."""
    model = tiny(family)
    export_model(model, "hf", tmp_path / "hf")
    tokenizer = tokenizer_of(model)
    ends = [tokenizer.id_of("<eos>"), tokenizer.id_of(template_for(family).end_of_turn)]
    assert len(set(ends)) == 2
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text())["eos_token_id"] == ends


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_rounded_once(tiny, tmp_path, dtype):
    model = tiny()
    export_model(model, "hf", tmp_path / "hf", options=ExportOptions(dtype=dtype))
    for path, value in values_of(load_model(str(tmp_path / "hf"), precision=dtype)).items():
        np.testing.assert_array_equal(value, values_of(model)[path].astype(dtype), err_msg=path)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == dtype


def test_what_float16_cannot_hold_is_an_error(tiny, tmp_path):
    model = tiny()
    scale = model.backbone.layer_norm.scale
    scale.assign(np.full(scale.shape, 1e5, np.float32))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has a value beyond 65504"):
        export_model(model, "hf", tmp_path / "hf", options=ExportOptions(dtype="float16"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quant_spec", [QuantSpec("int8"), QuantSpec("nf4", 32, True)], ids=["int8", "nf4"])
def test_quantized_weights_become_the_floats_they_stand_for(tiny, tmp_path, quant_spec):
    model = tiny(quant_spec=quant_spec)
    done = export_model(model, "hf", tmp_path / "hf")
    assert "Quantized weights were written as the float32 values" in done.notes[0]
    again = load_model(str(tmp_path / "hf"))
    floats = values_of(again)
    for layer in quantized_layers(model.backbone):
        wanted = np.asarray(dequantize(layer.quantized())).reshape(layer.float_kernel.shape)
        np.testing.assert_array_equal(floats[layer.float_kernel.path], wanted)


def test_a_setting_that_transformers_lacks_is_an_error(tiny, tmp_path):
    model = tiny("gemma3")
    model.backbone.local_rope_scaling_factor = 2.0
    with pytest.raises(ModelError, match=r"can't represent local_rope_scaling_factor=2\.0: it would have 1\.0"):
        export_model(model, "hf", tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_every_weight_has_a_place(tiny, monkeypatch):
    """Negative control: a variable that KerasHub's converter doesn't read is found."""
    model = tiny()
    config = hf_config(model, tokenizer_of(model), "float32")
    assert len(tensors_of(model.backbone, config)) == len(model.backbone.weights)
    monkeypatch.setattr(tensors, "ports", lambda backbone, config: ports(backbone, config)[1:])
    with pytest.raises(ModelError, match=r"Gemma3ForCausalLM has no place for token_embedding/embeddings"):
        tensors_of(model.backbone, config)


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])  # KerasHub reads those of Gemma 1 and 2 from tokenizer.model.
def test_tokenizer_json_alone_gives_the_same_tokens(tiny, family, tmp_path):
    """KerasHub's own reader of tokenizer.json, an independent one, makes the same ids of it."""
    model = tiny(family)
    export_model(model, "hf", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").unlink()
    again = tokenizer_of(load_model(str(tmp_path / "hf")))
    for text in (
        "How do I reset my phone?",
        "Größe  —  日本語 🙂\n\n\tx = 1",
        "<start_of_turn>user\nHi<end_of_turn>\n",
    ):
        assert again.encode(text) == tokenizer_of(model).encode(text)


class FunctionGemmaVocabulary:
    """Has FunctionGemma's tokens for tools."""

    def encode(self, text):
        return [7]


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "functiongemma"])
def test_the_jinja_template_renders_what_ours_does(family):
    template = template_for("gemma3", FunctionGemmaVocabulary()) if family == "functiongemma" else template_for(family)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message):
        raise ValueError(message)

    environment.globals["raise_exception"] = refuse
    jinja = environment.from_string(jinja_template(template))
    for turns in (
        [("user", "Hi")],
        [("system", " Be {kind}.\n"), ("user", "\n Hi 'there'  "), ("model", '"Hello" \\n'), ("user", "…")],
        [("system", "Be kind."), ("model", "Welcome."), ("user", "Hi"), ("model", "Yes?"), ("user", "No.")],
    ):
        for is_open in (False, True):
            messages = [{"role": role, "content": content} for role, content in turns]
            parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
            wanted = template.render([Turn(*turn) for turn in turns], add_generation_prompt=is_open)
            for given in (messages, parts):
                assert jinja.render(messages=given, bos_token="<bos>", add_generation_prompt=is_open) == wanted
    with pytest.raises(ValueError, match="not tool"):
        jinja.render(messages=[{"role": "tool", "content": ""}], bos_token="<bos>")


def test_memory_is_one_tensor_more(tiny, tmp_path):
    """No tensor is made before it is written, and the embedding goes by in rows."""
    model = tiny()
    config = hf_config(model, tokenizer_of(model), "float32")
    (embedding,) = [one for one in tensors_of(model.backbone, config) if one.name.endswith("embed_tokens.weight")]
    for chunk in embedding.chunks(np.dtype("float32")):
        assert not chunk.flags.owndata  # A view of the model's own array.


def test_quantized_layers_are_found_in_a_copy(tiny, tmp_path):
    model = tiny()
    quantize_layers(model.backbone, QuantSpec("int8"))
    export_model(model, "hf", tmp_path / "hf")
    assert quantized_layers(model.backbone)
