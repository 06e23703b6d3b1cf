"""Shardings of a model's variables, on abstract meshes that need no devices."""

import math

import jax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from gemma_tune.errors import ModelError
from gemma_tune.models.lora.enable import enable_lora
from gemma_tune.models.sharding.placement import MeshSharding
from gemma_tune.models.sharding.rules import matrix_mesh_axes, mesh_axes_of
from gemma_tune.quantization.spec import QuantSpec


def abstract_sharding(data=1, fsdp=1, model=1):
    types = (jax.sharding.AxisType.Auto,) * 3
    return MeshSharding(AbstractMesh((data, fsdp, model), ("data", "fsdp", "model"), types))


@pytest.mark.parametrize(
    ("quant_spec", "method"),
    [
        (None, {}),
        (QuantSpec("int8"), {}),
        (QuantSpec("int4", 32), {}),
        (QuantSpec("nf4", 32, True), {}),
        (None, {"layout": "peft", "use_dora": True}),
    ],
    ids=str,
)
def test_every_variable_of_every_family_has_a_place_that_it_fits(tiny, family, quant_spec, method):
    model = tiny(family, quant_spec=quant_spec)
    enable_lora(model.backbone, 2, 2.0, ["all-linear"], seed=0, **method)
    sharding = abstract_sharding(fsdp=2, model=2)
    num_cut = 0
    for variable, place in sharding.variable_shardings(model.backbone):
        place.shard_shape(tuple(variable.shape))  # Raises where an axis isn't divided evenly.
        num_cut += any(entry is not None for entry in place.spec)
        if variable.path.endswith("/kernel") and not any(name in variable.path for name in ("key", "value")):
            # As a layer's weights do, its codes lie in four parts.
            assert math.prod(place.shard_shape(tuple(variable.shape))) * 4 == math.prod(variable.shape), variable.path
    assert num_cut >= 10


def test_the_rules_by_name():
    assert mesh_axes_of("token_embedding/embeddings", 2) == (("model", "fsdp"), None)
    assert mesh_axes_of("decoder_block_3/attention/query/kernel", 3) == ("model", "fsdp", None)
    assert mesh_axes_of("decoder_block_3/attention/attention_output/kernel", 3) == ("model", None, "fsdp")
    assert mesh_axes_of("decoder_block_3/ffw_gating_2/kernel", 2) == ("fsdp", "model")
    assert mesh_axes_of("decoder_block_3/ffw_linear/kernel", 2) == ("model", "fsdp")
    assert mesh_axes_of("decoder_block_3/post_ffw_norm/scale", 1) == (None,)
    # LoRA's factors follow: A has the kernel's first axes, B its last.
    assert mesh_axes_of("decoder_block_3/attention/query/lora_kernel_a", 3) == ("model", "fsdp", None)
    assert mesh_axes_of("decoder_block_3/attention/query/lora_kernel_b", 2) == (None, None)
    assert mesh_axes_of("decoder_block_3/ffw_gating/lora_kernel_b", 2) == (None, "model")
    # PEFT's have the kernel's inputs, and its outputs; DoRA's magnitudes the outputs alone.
    assert mesh_axes_of("decoder_block_3/attention/query/lora_kernel_a", 2) == ("fsdp", None)
    assert mesh_axes_of("decoder_block_3/attention/query/lora_kernel_b", 3) == (None, "model", None)
    assert mesh_axes_of("decoder_block_3/attention/query/lora_kernel_magnitude", 2) == ("model", None)
    assert mesh_axes_of("decoder_block_3/attention/attention_output/lora_kernel_a", 3) == ("model", None, None)
    assert mesh_axes_of("decoder_block_3/attention/attention_output/lora_kernel_magnitude", 1) == ("fsdp",)
    assert mesh_axes_of("decoder_block_3/ffw_gating/lora_kernel_magnitude", 1) == ("model",)
    assert mesh_axes_of("token_embedding/lora_embeddings_a", 2) == (("model", "fsdp"), None)


def test_a_weight_without_a_rule_is_named():
    for path in ("decoder_block_0/attention/gate/kernel", "decoder_block_0/attention/gate/lora_kernel_a"):
        with pytest.raises(ModelError, match=f"No rule says how {path} is sharded"):
            mesh_axes_of(path, 2)


def test_what_cannot_be_cut():
    sharding = abstract_sharding(data=2, fsdp=4, model=2)
    # One key/value head is on every device; what fsdp can't cut in its place, it cuts along another axis.
    assert sharding.sharding_for(("model", "fsdp", None), (1, 64, 16)).spec == P(None, "fsdp", None)
    assert sharding.sharding_for(("model", "fsdp", None), (2, 10, 16)).spec == P("model", None, "fsdp")
    assert sharding.sharding_for(("model", "fsdp", None), (3, 10, 15)).spec == P(None, None, None)
    assert sharding.vocabulary_axes(1024) == ("model", "fsdp") and sharding.vocabulary_axes(12) == ("fsdp",)
    assert sharding.vocabulary_axes(2) == ("model",) and sharding.vocabulary_axes(7) == ()


def test_kernels_as_they_are_quantized():
    query, output = "decoder_block_0/attention/query/kernel", "decoder_block_0/attention/attention_output/kernel"
    assert matrix_mesh_axes(query, (4, 64, 16), (4, 64, 16)) == ("model", "fsdp", None)
    assert matrix_mesh_axes(output, (4, 16, 64), (1, 64, 64)) == (None, "model", "fsdp")
    assert matrix_mesh_axes("decoder_block_0/ffw_linear/kernel", (128, 64), (1, 128, 64)) == (None, "model", "fsdp")
    assert matrix_mesh_axes("token_embedding/embeddings", (1024, 64), (1024, 64, 1)) == (("model", "fsdp"), None, None)
