"""Makes the config.json of a backbone, with transformers' names for its settings.

KerasHub only reads such files. So each config is read back by KerasHub's own converter and compared with the backbone:
a model that transformers can't represent is refused.
"""

import inspect
from typing import Any

from gemma_tune.data.chat_template import template_for
from gemma_tune.errors import ModelError
from gemma_tune.models.family import family_of
from gemma_tune.models.sources.hf_checkpoint import sizes_of_config
from gemma_tune.models.sources.preset_catalog import context_tokens
from gemma_tune.models.sources.tokenizer import TextTokenizer
from gemma_tune.runtime.backend import keras, without_tensorflow

HF_ARCHITECTURES = {
    "gemma": ("GemmaForCausalLM", "gemma"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
    "gemma4": ("Gemma4ForCausalLM", "gemma4_text"),
}
_LOCAL_WAVELENGTH, _GLOBAL_WAVELENGTH = 10_000.0, 1_000_000.0  # Constants in KerasHub's code.
_SLIDING, _FULL = "sliding_attention", "full_attention"
_LAYERS_IN_GEMMA3_PATTERN = 6  # Five local layers and a global one.

# Backbone settings that a config holds in another form, if at all, and those of other modalities than text.
_SAID_OTHERWISE = {
    "query_head_dim_normalize", "layer_norm_epsilon", "local_rope_wavelength", "global_rope_wavelength", "dtype",
    "sliding_window_pattern", "vocab_size_per_layer_input", "global_head_dim", "num_experts_per_token", "dropout",
    "image_size", "use_vision_bidirectional_attention",
}  # fmt: skip


def hf_config(model: keras.Model, tokenizer: TextTokenizer, dtype: str) -> dict[str, Any]:
    """Returns the contents of a model's config.json.

    Args:
        model: CausalLM.
        tokenizer: Tokenizer of the model.
        dtype: Dtype of the weights in the checkpoint.

    Raises:
        ModelError: transformers' class of the family can't represent a setting of the backbone; says which.
    """
    backbone, family = model.backbone, family_of(model)
    architecture, model_type = HF_ARCHITECTURES[family]
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": backbone.vocabulary_size,
        "hidden_size": backbone.hidden_dim,
        "intermediate_size": backbone.intermediate_dim,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_query_heads,
        "num_key_value_heads": backbone.num_key_value_heads,
        "head_dim": backbone.head_dim,
        "rms_norm_eps": backbone.layer_norm_epsilon,
        "max_position_embeddings": context_tokens(family, backbone.count_params()),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_id,
        # Both tokens end an answer, also for readers that know no generation_config.json. Google's models say the same.
        "eos_token_id": stop_ids(tokenizer, family),
        "pad_token_id": tokenizer.pad_id,
        "torch_dtype": dtype,
        **_OF_FAMILY[family](backbone),
    }
    _check(backbone, config)
    return config


def stop_ids(tokenizer: TextTokenizer, family: str) -> list[int]:
    """Returns the tokens that end an answer: the end of a text, and the end of a turn."""
    return [tokenizer.eos_id, tokenizer.id_of(template_for(family).end_of_turn)]


def _gemma(backbone: Any) -> dict[str, Any]:
    return {
        "intermediate_size": backbone.intermediate_dim // 2,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": _LOCAL_WAVELENGTH,
    }


def _gemma2(backbone: Any) -> dict[str, Any]:
    return {
        **_gemma(backbone),
        "query_pre_attn_scalar": _query_scalar(backbone),
        "sliding_window": backbone.sliding_window_size,
        "layer_types": [(_SLIDING, _FULL)[index % 2] for index in range(backbone.num_layers)],
        "final_logit_softcapping": backbone.final_logit_soft_cap,
        "attn_logit_softcapping": backbone.attention_logit_soft_cap,
    }


def _gemma3(backbone: Any) -> dict[str, Any]:
    last = _LAYERS_IN_GEMMA3_PATTERN - 1
    is_sliding = [
        backbone.use_sliding_window_attention and index % _LAYERS_IN_GEMMA3_PATTERN < last
        for index in range(backbone.num_layers)
    ]
    factor = backbone.global_rope_scaling_factor
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(backbone),
        "sliding_window": backbone.sliding_window_size,
        "layer_types": [_SLIDING if one else _FULL for one in is_sliding],
        "final_logit_softcapping": backbone.final_logit_soft_cap,
        "attn_logit_softcapping": backbone.attention_logit_soft_cap,
        "rope_theta": _GLOBAL_WAVELENGTH,
        "rope_local_base_freq": _LOCAL_WAVELENGTH,
        "rope_scaling": None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
    }


def _gemma4(backbone: Any) -> dict[str, Any]:
    global_rope = {
        "rope_type": "proportional",
        "partial_rotary_factor": backbone.global_rope_partial_rotary_factor,
        "rope_theta": backbone.global_rope_wavelength or _GLOBAL_WAVELENGTH,
    }
    local_rope = {"rope_type": "default", "rope_theta": backbone.local_rope_wavelength or _LOCAL_WAVELENGTH}
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": backbone.sliding_window_size,
        "layer_types": list(backbone.layer_types),
        "final_logit_softcapping": backbone.final_logit_soft_cap,
        "global_head_dim": backbone.global_head_dim or backbone.head_dim,
        "num_global_key_value_heads": backbone.num_global_key_value_heads,
        "attention_k_eq_v": backbone.num_global_key_value_heads is not None,
        "num_kv_shared_layers": backbone.num_kv_shared_layers,
        "hidden_size_per_layer_input": backbone.hidden_size_per_layer_input,
        "vocab_size_per_layer_input": backbone.vocab_size_per_layer_input or backbone.vocabulary_size,
        "use_double_wide_mlp": backbone.use_double_wide_mlp,
        "enable_moe_block": backbone.enable_moe_block,
        "num_experts": backbone.num_experts,
        "moe_intermediate_size": backbone.expert_intermediate_dim,
        "top_k_experts": backbone.num_experts_per_token if backbone.enable_moe_block else None,
        "rope_parameters": {_FULL: global_rope, _SLIDING: local_rope},
    }


_OF_FAMILY = {"gemma": _gemma, "gemma2": _gemma2, "gemma3": _gemma3, "gemma4": _gemma4}


def _query_scalar(backbone: Any) -> int:
    if backbone.query_head_dim_normalize:
        return backbone.head_dim
    return backbone.hidden_dim // backbone.num_query_heads


def _check(backbone: Any, config: dict[str, Any]) -> None:
    """Raises ModelError if KerasHub builds a backbone with another setting from the config."""
    parameters = inspect.signature(type(backbone).__init__).parameters
    read = {name: one.default for name, one in parameters.items()} | sizes_of_config(config)
    skipped = _SAID_OTHERWISE | (set() if backbone.use_sliding_window_attention else {"sliding_window_size"})
    with without_tensorflow():
        settings = backbone.get_config()
    for name, value in settings.items():
        if name in read and name not in skipped and value != read[name]:
            raise ModelError(
                f"transformers' {config['architectures'][0]} can't represent {name}={value!r}: it would have "
                f"{read[name]!r}. Use --format=keras."
            )
