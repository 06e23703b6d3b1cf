"""Adds a model's hyperparameters, provenance, tokenizer and chat template to a GGUF file.

The keys are those that llama.cpp's src/models/gemma.cpp, gemma2.cpp and gemma3.cpp read. A model that no such keys can
describe is refused.
"""

from typing import Any

from gemma_tune.data.chat_template import ChatTemplate
from gemma_tune.errors import ModelError
from gemma_tune.export.card.provenance import hugging_face_name
from gemma_tune.export.jinja_template import jinja_template
from gemma_tune.models.family import family_of
from gemma_tune.models.sources.gguf_checkpoint import GGUF_MODEL_TYPES, LAYERS_OF_27B
from gemma_tune.models.sources.tokenizer import TextTokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# User-defined tokens in SentencePiece, control tokens in llama.cpp: those aren't shown, and a text that spells them
# becomes them only where a program allows it.
_CONTROL_PIECES = frozenset(["<mask>", "<2mass>", "[@BOS@]", "<start_of_turn>", "<end_of_turn>"])
_CONTROL_STARTS = ("<unused", "<|fim_", "<|file_")


def family_for_gguf(backbone: Any) -> str:
    """Returns a backbone's family.

    Raises:
        ModelError: llama.cpp would not compute the same as this model; says why.
    """
    family = family_of(backbone)
    if family not in GGUF_MODEL_TYPES:
        raise ModelError(
            f"GGUF export writes {', '.join(GGUF_MODEL_TYPES)}, not {family}. Use --format=hf, and convert that folder "
            "with llama.cpp's convert_hf_to_gguf.py."
        )
    for problem in _problems(backbone, family):
        raise ModelError(f"llama.cpp's {family} can't represent this model: {problem}. Use --format=hf or keras.")
    return family


def add_hyperparameters(writer: Any, config: dict[str, Any], family: str) -> None:
    """Adds the hyperparameters.

    Args:
        writer: A GGUFWriter.
        config: Hugging Face config, from `hf_config`.
        family: `gemma`, `gemma2` or `gemma3`.
    """
    import gguf

    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    if "rope_theta" in config:
        writer.add_rope_freq_base(config["rope_theta"])
    if "rope_local_base_freq" in config:
        writer.add_rope_freq_base_swa(config["rope_local_base_freq"])
    if config.get("rope_scaling"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])
    if family != "gemma":
        writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def add_provenance(writer: Any, family: str, num_weights: int, name: str, base: str) -> None:
    """Adds the model's name, its license, and its base model.

    Args:
        writer: A GGUFWriter.
        family: Model family, such as `gemma3`.
        num_weights: Number of parameters.
        name: Name of the model.
        base: Base model, such as `gemma3_270m` or `hf://google/gemma-3-270m`; '' if unknown.
    """
    import gguf

    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(num_weights, num_weights, 0, 0))
    writer.add_license("gemma")
    writer.add_license_link("https://ai.google.dev/gemma/terms")
    writer.add_tags([family, "gemma", "text-generation"])
    hub_name = hugging_face_name(base)
    if hub_name:
        owner, repository = hub_name.split("/", 1)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, repository)
        writer.add_base_model_organization(0, owner)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{hub_name}")


def add_tokenizer(writer: Any, tokenizer: TextTokenizer, template: ChatTemplate) -> None:
    """Adds the vocabulary, the special tokens and the chat template."""
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2
    model = schema.ModelProto.FromString(tokenizer.proto)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    kinds = [_kind(piece) for piece in model.pieces]
    # llama.cpp looks for a user-defined token in the text itself, so runs of spaces are spelled with spaces.
    writer.add_token_list(
        [
            (piece.piece.replace("▁", " ") if kind == _USER_DEFINED else piece.piece).encode()
            for piece, kind in zip(model.pieces, kinds, strict=True)
        ]
    )
    writer.add_token_scores([piece.score for piece in model.pieces])
    writer.add_token_types(kinds)
    trainer = model.trainer_spec
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(trainer.unk_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_eot_token_id(tokenizer.id_of(template.end_of_turn))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(jinja_template(template))


def _kind(piece: Any) -> int:
    if piece.type == _USER_DEFINED and (piece.piece in _CONTROL_PIECES or piece.piece.startswith(_CONTROL_STARTS)):
        return _CONTROL
    return piece.type


def _problems(backbone: Any, family: str) -> list[str]:
    """Lists settings of a backbone that no GGUF key holds and for which llama.cpp assumes something else."""
    soft_cap = backbone.attention_logit_soft_cap
    windowed = backbone.use_sliding_window_attention
    found = []
    if family == "gemma" and (windowed or soft_cap or backbone.final_logit_soft_cap):
        found.append("it has a sliding window or soft caps, but not Gemma 2's norms (as VaultGemma)")
    if family == "gemma2" and not (windowed and soft_cap and backbone.final_logit_soft_cap):
        found.append("it lacks a sliding window or soft caps")
    if family == "gemma3":
        if soft_cap:
            found.append("it caps attention logits")
        if not windowed or not backbone.use_query_key_norm:
            found.append("it lacks a sliding window or the normalization of queries and keys")
        if backbone.local_rope_scaling_factor != 1.0:
            found.append("its local layers scale their positions")
        if backbone.use_bidirectional_attention:
            found.append("it is an embedding model with bidirectional attention")
    if family != "gemma" and not (backbone.use_post_attention_norm and backbone.use_post_ffw_norm):
        found.append("it lacks a norm after its attention or feed-forward layers")
    # llama.cpp takes the attention's scale from the number of layers.
    model_type = GGUF_MODEL_TYPES[family]
    by_width = backbone.num_layers == LAYERS_OF_27B.get(model_type)
    scale = backbone.head_dim if backbone.query_head_dim_normalize else backbone.hidden_dim / backbone.num_query_heads
    taken = backbone.hidden_dim // backbone.num_query_heads if by_width else backbone.head_dim
    if scale != taken:
        found.append(f"its attention divides by sqrt({scale:g}), llama.cpp's by sqrt({taken:g})")
    return found
