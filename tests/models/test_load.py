"""Every kind of place a model can be loaded from gives the same logits."""

import json
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
from helpers.checkpoints import write_gguf, write_hf
from helpers.logits import logits

from gemma_tune.errors import ModelError
from gemma_tune.models.functional import hidden_states
from gemma_tune.models.load import load_model, load_tokenizer
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.runtime.backend import keras_hub


@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face_directory(tiny, tmp_path, shards):
    for family in ("gemma", "gemma2", "gemma3"):
        model = tiny(family)
        again = load_model(str(write_hf(model, family, tmp_path / family, shards)))
        np.testing.assert_array_equal(logits(again), logits(model))
        assert tokenizer_of(again).encode("Reset it") == tokenizer_of(model).encode("Reset it")
        assert load_tokenizer(str(tmp_path / family))[1] == family


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_gguf(tiny, tmp_path, family):
    model = tiny(family)
    path = str(write_gguf(model, family, tmp_path / "m.gguf"))
    again = load_model(path)
    # Norms are stored as 1 + scale, and scales of 0 come back exactly.
    np.testing.assert_array_equal(logits(again), logits(model))
    text = "<start_of_turn>user\nÜber 日本  x<end_of_turn>\n"
    assert tokenizer_of(again).encode(text) == tokenizer_of(model).encode(text)
    assert tokenizer_of(again).decode(tokenizer_of(again).encode(text)) == text
    tokenizer, found = load_tokenizer(path)
    assert found == family and tokenizer.encode(text) == tokenizer_of(model).encode(text)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "Q4_1"])
def test_quantized_gguf_is_what_the_gguf_package_dequantizes(tiny, tmp_path, kind):
    model = tiny("gemma3")
    again = load_model(str(write_gguf(model, "gemma3", tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind])))
    quantization = gguf.GGMLQuantizationType[kind]
    embeddings = np.asarray(model.backbone.token_embedding.embeddings)
    wanted = gguf.quants.dequantize(gguf.quants.quantize(embeddings, quantization), quantization)
    np.testing.assert_array_equal(np.asarray(again.backbone.token_embedding.embeddings), wanted)


@pytest.mark.nightly
def test_keras_preset_in_a_fresh_process(tiny, family, tmp_path):
    """save_to_preset, then KerasHub's own from_preset in another process, without gemma_tune."""
    model = tiny(family)
    model.save_to_preset(str(tmp_path / "preset"))
    np.save(tmp_path / "logits.npy", logits(model))
    np.testing.assert_array_equal(logits(load_model(str(tmp_path / "preset"))), logits(model))
    if family != "gemma3":
        return  # One process of ten seconds is enough.
    script = (
        "import sys; sys.modules['tensorflow'] = None; import keras_hub, numpy as np\n"
        "model = keras_hub.models.CausalLM.from_preset(sys.argv[1], dtype='float32')\n"
        "ids = np.arange(10, 30)[None]; out = model({'token_ids': ids, 'padding_mask': np.ones_like(ids)})\n"
        "np.testing.assert_allclose(np.asarray(out), np.load(sys.argv[2]), atol=1e-4)\n"
        "print(repr(model.generate('How do', max_length=12)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "preset"), str(tmp_path / "logits.npy")],
        env={**os.environ, "KERAS_BACKEND": "jax"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "How do" in done.stdout


def test_only_the_text_part_of_a_vision_model_is_loaded(tiny, tmp_path):
    from keras_hub.src.models.gemma3.gemma3_vision_encoder import Gemma3VisionEncoder

    encoder = Gemma3VisionEncoder(
        image_size=16,
        patch_size=4,
        pool_size=2,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        output_dim=32,
    )
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=1024, image_size=16, num_layers=2, num_query_heads=2, num_key_value_heads=1, hidden_dim=32, intermediate_dim=64,
        head_dim=16, vision_encoder=encoder, dtype="float32",
    )  # fmt: skip
    backbone.save_to_preset(str(tmp_path))
    tiny().preprocessor.tokenizer.save_to_preset(str(tmp_path))
    model = load_model(str(tmp_path))
    assert set(model.backbone.input) == {"token_ids", "padding_mask"}
    kernel = model.backbone.transformer_layers[1].ffw_linear.kernel
    np.testing.assert_array_equal(np.asarray(kernel), np.asarray(backbone.transformer_layers[1].ffw_linear.kernel))


def test_it_behaves_as_a_keras_hub_causal_lm(tiny, family, capsys):
    model = tiny(family)
    assert isinstance(model, keras_hub.models.CausalLM)
    assert model.generate("How do I", max_length=16).startswith("How do I")
    model.summary()
    assert "backbone" in capsys.readouterr().out.lower()
    model.preprocessor.sequence_length = 16
    model.compile(optimizer="sgd", loss="auto")
    before = np.asarray(model.backbone.layer_norm.scale)
    history = model.fit(["How do I reset it?", "It is easy."], batch_size=2, verbose=0)
    assert np.isfinite(history.history["loss"][0])
    assert not np.array_equal(before, np.asarray(model.backbone.layer_norm.scale))


def test_the_scale_of_27b_attention_is_passed_on():
    """KerasHub's blocks ignore query_head_dim_normalize; loading sets it right."""
    from gemma_tune.models.load import correct_query_scale

    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=64, image_size=None, num_layers=1, num_query_heads=2, num_key_value_heads=1, hidden_dim=48, intermediate_dim=32, head_dim=16,
        query_head_dim_normalize=False,
    )  # fmt: skip
    assert (
        backbone.transformer_layers[0].attention.query_head_dim_normalize is True
    )  # The library's fault; if mended, drop ours.
    correct_query_scale(backbone)
    assert backbone.transformer_layers[0].attention.query_head_dim_normalize is False


@pytest.mark.nightly
def test_precisions(tiny):
    for precision, variables, compute in (
        ("bfloat16", "bfloat16", "bfloat16"),
        ("mixed_bfloat16", "float32", "bfloat16"),
        ("float16", "float16", "float16"),
        ("mixed_float16", "float32", "float16"),
    ):
        model = tiny("gemma3", precision=precision)
        assert model.backbone.token_embedding.embeddings.dtype == variables
        hidden = hidden_states(model.backbone, *(np.ones((1, 4), np.int32) for _ in range(3)))
        assert hidden.dtype == compute
    with pytest.raises(
        ModelError,
        match="precision must be one of float32, bfloat16, float16, mixed_bfloat16, mixed_float16; got 'bf16'",
    ):
        tiny("gemma3", precision="bf16")


def test_damaged_directories(tiny, tmp_path):
    directory = write_hf(tiny("gemma3"), "gemma3", tmp_path / "m")
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"model.safetensors can't be read as safetensors.*Download it again"):
        load_model(str(directory))
    weights.write_bytes(whole)
    config = json.loads((directory / "config.json").read_text())
    for change, message in (
        ({"model_type": "llama"}, r"holds a model of type 'llama'. Gemma types"),
        ({"num_hidden_layers": 7}, r"has no tensor 'model.layers.6"),
        ({"vocab_size": 2048}, r"token_embedding/embeddings has shape \(2048, 64\)"),
    ):
        (directory / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=message):
            load_model(str(directory))
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "hidden_size"}))
    with pytest.raises(ModelError, match="config.json lacks 'hidden_size'"):
        load_model(str(directory))


def test_a_download_without_network_says_so_and_nothing_of_licences():
    with pytest.raises(ModelError) as caught:
        load_model("hf://google/gemma-3-1b-it")
    assert "isn't on this machine yet, and huggingface.co can't be reached" in str(caught.value)
    assert "HF_HUB_OFFLINE is set" in str(caught.value)  # By tests/conftest.py.
    assert "terms" not in str(caught.value) and "hf auth login" not in str(caught.value)


@pytest.mark.parametrize("source", ["hf://google/gemma-3-1b-it", "gemma3_1b"])
@pytest.mark.parametrize("where", ["itself", "the cause", "the context"])
def test_a_server_that_is_not_reached(monkeypatch, source, where):
    """The libraries wrap what the socket says, each in its own way."""
    import huggingface_hub
    import kagglehub

    def refuse(*args, **kwargs):
        refused = ConnectionRefusedError(111, "Connection refused")
        if where == "itself":
            raise refused
        if where == "the cause":
            raise RuntimeError("Max retries exceeded with url: /v1/models") from refused
        try:
            raise refused
        except OSError:
            raise ValueError("an error occurred while trying to locate the files")  # noqa: B904

    monkeypatch.setattr(kagglehub, "model_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    host = "huggingface.co" if "hf" in source else "kaggle.com"
    with pytest.raises(ModelError, match=rf"{host} can't be reached: \[Errno 111\] Connection refused") as caught:
        load_model(source)
    assert "terms" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("403 Client Error: you don't have access", "Accept the model's terms on its page at kaggle.com/models"),
        ("Failed to resolve host", "Check the network and the name."),
    ],
)
def test_kaggle_errors_say_what_to_do(monkeypatch, error, advice):
    import kagglehub

    def refuse(*args, **kwargs):
        raise ValueError(error)

    monkeypatch.setattr(kagglehub, "model_download", refuse)
    with pytest.raises(ModelError, match=rf"gemma3_1b can't be downloaded from Kaggle: {error[:10]}.*{advice}"):
        load_model("gemma3_1b")
