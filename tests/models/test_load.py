"""Every kind of place a model can be loaded from gives the same logits."""

import json
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
from helpers.logits import logits

from gemma_tune.errors import ModelError
from gemma_tune.models.functional import hidden_states
from gemma_tune.models.load import load_model, load_tokenizer
from gemma_tune.models.sources.tiny import TOKENIZER_PATH
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.runtime.backend import keras_hub


def hf_tensors(model):
    """A tiny model's weights under their Hugging Face names and in their layout, [out, in]; for Gemma 1 to 3."""
    backbone = model.backbone
    tensors = {
        "model.embed_tokens.weight": backbone.token_embedding.embeddings,
        "model.norm.weight": backbone.layer_norm.scale,
    }
    for index, block in enumerate(backbone.transformer_layers):
        attention, layer = block.attention, f"model.layers.{index}."
        heads = lambda kernel: np.asarray(kernel).transpose(0, 2, 1).reshape(-1, kernel.shape[1])
        tensors[layer + "input_layernorm.weight"] = block.pre_attention_norm.scale
        for name in ("query", "key", "value"):
            tensors[f"{layer}self_attn.{name[0]}_proj.weight"] = heads(getattr(attention, f"{name}_dense").kernel)
        output = np.asarray(attention.output_dense.kernel)
        tensors[layer + "self_attn.o_proj.weight"] = output.reshape(-1, output.shape[-1]).T
        if hasattr(attention, "query_norm"):
            tensors[layer + "self_attn.q_norm.weight"], tensors[layer + "self_attn.k_norm.weight"] = (
                attention.query_norm.scale,
                attention.key_norm.scale,
            )
        for ours, theirs in (("gating_ffw", "gate_proj"), ("gating_ffw_2", "up_proj"), ("ffw_linear", "down_proj")):
            tensors[f"{layer}mlp.{theirs}.weight"] = np.asarray(getattr(block, ours).kernel).T
        if hasattr(block, "post_ffw_norm"):
            tensors[layer + "post_attention_layernorm.weight"] = block.post_attention_norm.scale
            tensors[layer + "pre_feedforward_layernorm.weight"] = block.pre_ffw_norm.scale
            tensors[layer + "post_feedforward_layernorm.weight"] = block.post_ffw_norm.scale
        else:
            tensors[layer + "post_attention_layernorm.weight"] = block.pre_ffw_norm.scale
    return {name: np.ascontiguousarray(np.asarray(value, np.float32)) for name, value in tensors.items()}


def hf_config(model, family):
    backbone = model.backbone
    config = {
        "model_type": "gemma3_text" if family == "gemma3" else family,
        "vocab_size": backbone.vocabulary_size,
        "hidden_size": backbone.hidden_dim,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_query_heads,
        "num_key_value_heads": backbone.num_key_value_heads,
        "intermediate_size": backbone.intermediate_dim // (1 if family == "gemma3" else 2),
        "head_dim": backbone.head_dim,
        "query_pre_attn_scalar": backbone.head_dim,
    }
    if family != "gemma":
        config["sliding_window"] = backbone.sliding_window_size
    if family == "gemma2":
        config |= {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
    return config


def write_hf(model, family, directory, shards=1):
    from safetensors.numpy import save_file

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf_config(model, family)))
    (directory / "tokenizer.model").write_bytes(TOKENIZER_PATH.read_bytes())
    tensors = hf_tensors(model)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = list(tensors)
    weight_map = {name: f"part{index % shards}.safetensors" for index, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def write_gguf(model, family, path, quantization=gguf.GGMLQuantizationType.F32):
    """Writes the model with the gguf package, as llama.cpp's converter lays a Gemma out."""
    from sentencepiece import SentencePieceProcessor

    config = hf_config(model, family)
    writer = gguf.GGUFWriter(path, family)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    processor = SentencePieceProcessor(model_file=str(TOKENIZER_PATH))
    count = processor.vocab_size()
    writer.add_tokenizer_model("llama")
    # llama.cpp's converter spells runs of spaces with spaces.
    spelled = [processor.id_to_piece(i) for i in range(count)]
    writer.add_token_list(
        [(piece.replace("▁", " ") if set(piece) == {"▁"} and len(piece) > 1 else piece).encode() for piece in spelled]
    )
    writer.add_token_scores([processor.get_score(i) for i in range(count)])
    control, defined = ("<start", "<end", "<|turn", "<turn"), ("\n", "\n\n", "▁▁", "▁▁▁▁")
    kind_of = lambda i: (
        3
        if i < 4 or spelled[i].startswith(control)
        else 4
        if spelled[i] in defined
        else 6
        if processor.is_byte(i)
        else 1
    )
    writer.add_token_types([kind_of(i) for i in range(count)])
    for name, token_id in (("bos", 2), ("eos", 1), ("unk", 3), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(token_id)
    for name, values in hf_tensors(model).items():
        *layer, part = (
            name.removesuffix(".weight").replace("model.layers.", "blk.").split(".", 2)
            if "layers" in name
            else [name.removesuffix(".weight")]
        )
        if family == "gemma" and part == "post_attention_layernorm":
            part = "pre_feedforward_layernorm"
        if "norm" in name:
            values = values + 1
        kind = quantization if values.ndim == 2 and values.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        data = values if kind == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(values, kind)
        writer.add_tensor(".".join([*layer, GGUF_NAMES[part], "weight"]), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_download_without_network_or_consent_says_what_to_do():
    with pytest.raises(
        ModelError, match=r"hf://google/gemma-3-1b-it can't be downloaded|asks for consent|doesn't exist"
    ):
        load_model("hf://google/gemma-3-1b-it")


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
