"""Writes tiny models as Hugging Face checkpoints and GGUF files, independently of gemma_tune's own exports."""

import json

import gguf
import numpy as np

from gemma_tune.models.sources.tiny import TOKENIZER_PATH


def hf_tensors(model):
    """Returns a tiny model's weights under their Hugging Face names and in their layout, [out, in]; for Gemma 1 to 3."""
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
