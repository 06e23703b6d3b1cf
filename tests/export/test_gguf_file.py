"""GGUF files that we write, in our own reader and the gguf package's; llama.cpp itself is in tests/readers."""

import gguf
import jinja2
import numpy as np
import pytest
from helpers.logits import logits
from helpers.lora import with_lora
from helpers.variants import variant

from gemma_tune.data.chat_template import template_for
from gemma_tune.data.example import Turn
from gemma_tune.errors import ModelError
from gemma_tune.export.gguf.modelfile import modelfile
from gemma_tune.export.gguf.writer import estimate_gguf, write_gguf
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.load import load_model
from gemma_tune.models.sources.gguf_reader import GgufFile
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.quantization.spec import QuantSpec

FAMILIES_OF_GGUF = ("gemma", "gemma2", "gemma3")


@pytest.mark.parametrize("family", FAMILIES_OF_GGUF)
def test_float32_comes_back_bit_for_bit(tiny, family, tmp_path):
    model = tiny(family)
    path = write_gguf(model, tmp_path / "m.gguf", "f32")
    again = load_model(str(path))
    np.testing.assert_array_equal(logits(again), logits(model))
    assert tokenizer_of(again).proto  # A tokenizer that says the same:
    for text in ("<start_of_turn>user\nÜber 日本  x<end_of_turn>\n", " a\t\n\n\n", "🙂   "):
        assert tokenizer_of(again).encode(text) == tokenizer_of(model).encode(text)


@pytest.mark.parametrize("scheme", ["f16", "bf16", "q8_0", "q4_k_m", "q4_0"])
def test_weights_are_those_rounded(tiny, tmp_path, scheme):
    """Each weight is within half a step of the model's: float16 has 11 bits, bfloat16 8, and so on, relative to the
    largest weight of a block.
    """
    model = tiny("gemma3")
    path = write_gguf(model, tmp_path / "m.gguf", scheme)
    wanted = np.asarray(model.backbone.token_embedding.embeddings)
    found = np.asarray(load_model(str(path)).backbone.token_embedding.embeddings)
    largest = np.abs(wanted.reshape(-1, 32)).max(axis=1, keepdims=True)
    step = {"f16": 2**-11, "bf16": 2**-8}.get(scheme, 1 / 127 / 2 + 2**-11)  # The tiny embedding is Q8_0 in the rest.
    assert (np.abs(found - wanted).reshape(-1, 32) <= largest * step).all()
    assert path.stat().st_size == pytest.approx(estimate_gguf(model, scheme), rel=0.15)


def test_lora_counts_as_merged_and_the_model_stays(tiny, tmp_path, rng):
    model = tiny("gemma3")
    with_lora(model, rng, {})
    before = logits(model)
    again = load_model(str(write_gguf(model, tmp_path / "m.gguf", "f32")))
    # One product with the merged kernel for two beside each other: float32's rounding.
    np.testing.assert_allclose(logits(again), before, atol=2e-5)
    assert lora_layers(model.backbone)
    np.testing.assert_array_equal(logits(model), before)
    assert np.abs(before - logits(tiny("gemma3"))).max() > 0.1  # The factors do something.


def test_codes_count_as_their_floats(tiny, tmp_path):
    model = tiny("gemma3", quant_spec=QuantSpec("int4", 32))
    again = load_model(str(write_gguf(model, tmp_path / "m.gguf", "f32")))
    np.testing.assert_allclose(logits(again), logits(model), atol=2e-5)


def test_what_llama_cpp_needs_is_in_it(tiny, tmp_path):
    model = tiny("gemma3")
    path = write_gguf(model, tmp_path / "m.gguf", "q8_0", name="Mine", base="gemma3_instruct_1b")
    theirs = gguf.GGUFReader(path)
    value = lambda key: theirs.fields[key].contents()
    assert (value("general.name"), value("general.license"), value("general.file_type")) == ("Mine", "gemma", 7)
    assert value("general.base_model.0.repo_url") == "https://huggingface.co/google/gemma-3-1b-it"
    assert (value("gemma3.attention.sliding_window"), value("gemma3.rope.freq_base")) == (16, 1_000_000.0)
    assert value("gemma3.rope.freq_base_swa") == 10_000.0
    assert value("tokenizer.ggml.add_bos_token") and not value("tokenizer.ggml.add_space_prefix")
    tokenizer = tokenizer_of(model)
    assert value("tokenizer.ggml.eot_token_id") == tokenizer.id_of("<end_of_turn>")
    types = GgufFile(path).metadata["tokenizer.ggml.token_type"]
    assert types[tokenizer.id_of("<start_of_turn>")] == 3  # Control.
    assert not [tensor.name for tensor in theirs.tensors if "norm" in tensor.name and tensor.tensor_type != 0]


def test_the_chat_template_renders_as_ours(tiny, tmp_path):
    path = write_gguf(tiny("gemma3"), tmp_path / "m.gguf", "q8_0")
    template = jinja2.Environment().from_string(GgufFile(path).text("tokenizer.chat_template"))
    turns = [("system", "Be brief."), ("user", "Hi "), ("model", "Hello"), ("user", "Bye")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert template.render(messages=messages, bos_token="<bos>", add_generation_prompt=True) == template_for(
        "gemma3"
    ).render([Turn(*turn) for turn in turns], add_generation_prompt=True)


def test_the_modelfile(tiny, tmp_path):
    write_gguf(tiny("gemma3"), tmp_path / "m.gguf", "q8_0")
    text = (tmp_path / "Modelfile").read_text()
    assert text == modelfile("m.gguf", template_for("gemma3"), 8192)
    assert "FROM ./m.gguf\n" in text and 'PARAMETER stop "<end_of_turn>"' in text and "<start_of_turn>model\n" in text


def test_what_cannot_be_written_is_refused(tiny, tmp_path):
    with pytest.raises(ModelError, match=r"no GGUF scheme 'q4_km'. Did you mean q4_k_m"):
        write_gguf(tiny("gemma3"), tmp_path / "m.gguf", "q4_km")
    with pytest.raises(ModelError, match=r"GGUF export writes gemma, gemma2, gemma3, not gemma4"):
        write_gguf(tiny("gemma4"), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("gemma", {"use_sliding_window_attention": True}, "sliding window or soft caps"),
        ("gemma2", {"query_head_dim_normalize": False, "num_query_heads": 2}, "its attention divides by"),
        ("gemma3", {"attention_logit_soft_cap": 50.0}, "it caps attention logits"),
        ("gemma3", {"use_bidirectional_attention": True}, "bidirectional attention"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, family, changed, message):
    with pytest.raises(ModelError, match=message):
        write_gguf(variant(family, **changed), tmp_path / "m.gguf")
