"""KerasHub Gemmas of any shape with random weights, made where they are used: nothing is read or copied."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.shapes import Shape
from gemma_tune.models.family import FAMILIES
from gemma_tune.models.sources.lazy_initialization import lazy_initialization
from gemma_tune.runtime.backend import keras

_SCALE = 0.02  # Of kernels and embedding, as Gemma's configurations have it.


def random_model(shape: Shape, precision: str) -> keras.Model:
    """Returns a CausalLM without preprocessor. Equal shapes get equal weights on equal devices."""
    classes = FAMILIES[shape.family]
    with lazy_initialization():
        backbone = classes.causal_lm.backbone_cls(dtype=precision, **arguments(shape))
    for index, variable in enumerate(backbone.variables):
        initializer = variable._initializer
        if isinstance(initializer, (keras.initializers.Zeros, keras.initializers.Ones)):
            variable.assign(jnp.asarray(initializer(variable.shape), variable.dtype))
        else:
            variable.assign(_normal(jax.random.key(index), tuple(variable.shape), variable.dtype))
    return classes.causal_lm(preprocessor=None, backbone=backbone)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return (_SCALE * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def arguments(shape: Shape) -> dict:
    """Returns what KerasHub's backbones are built with."""
    sizes = {
        "vocabulary_size": shape.vocabulary,
        "num_layers": shape.layers,
        "num_query_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "hidden_dim": shape.width,
        "intermediate_dim": shape.feed_forward,
        "head_dim": shape.head_width,
        "use_sliding_window_attention": True,
        "sliding_window_size": shape.window,
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
    }
    if shape.family == "gemma3":
        return {**sizes, "image_size": None}
    # KerasHub's Gemma 2 counts both halves of the gated layer.
    caps = {"attention_logit_soft_cap": 50.0, "final_logit_soft_cap": 30.0}
    return {**sizes, **caps, "intermediate_dim": 2 * shape.feed_forward}
