"""No device holds more than its shard: loaded presets, embedding lookups, attention kernels, gathered weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_tune.config import Config
from gemma_tune.mesh import MeshShape
from gemma_tune.models.attention.kernels import causal_attention, splash_attention
from gemma_tune.models.attention.sharded import shard_map_attention
from gemma_tune.models.functional import parameters
from gemma_tune.models.load import load_model
from gemma_tune.models.preset import save_preset
from gemma_tune.models.sharding.layers import sharded_lookup
from gemma_tune.models.sharding.placement import make_mesh_sharding
from gemma_tune.planning.abstract_train_state import abstract_train_state
from gemma_tune.quantization.codes import dequantize, quantize
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import keras
from gemma_tune.training.step.train_step import make_train_step


def at_night(value):
    """Returns a parameter whose tests run with `pytest -m nightly` alone."""
    return pytest.param(value, marks=pytest.mark.nightly)


def watching(function, sizes):
    """Wraps a function so that the sizes of what it puts on each device are appended to `sizes`."""

    def watched(*arguments, **named):
        made = function(*arguments, **named)
        sizes.extend(shard.data.size for leaf in jax.tree.leaves(made) for shard in leaf.addressable_shards)
        return made

    return watched


def sharding_of(mesh):
    return make_mesh_sharding(mesh, 8)


@pytest.mark.parametrize(
    "quant_spec", [at_night(None), QuantSpec("int4", 32), at_night(QuantSpec("nf4", 32, True))], ids=str
)
@pytest.mark.parametrize("mesh", ["fsdp:4,model:2", at_night("model:8")])
def test_a_preset_is_loaded_part_by_part(tmp_path, monkeypatch, mesh, quant_spec):
    save_preset(load_model("tiny:gemma2"), tmp_path / "preset")
    whole = parameters(load_model(str(tmp_path / "preset"), quant_spec=quant_spec))
    sizes = []
    for module, name in ((jax, "device_put"), (keras.src.backend.jax.core.JaxVariable, "_convert_to_tensor")):
        monkeypatch.setattr(module, name, watching(getattr(module, name), sizes))
    load_model(str(tmp_path / "preset"), quant_spec=quant_spec)
    assert max(sizes) >= 1024 * 64 // (2 if quant_spec else 1)  # A control: on one device the embedding comes whole.
    sizes.clear()
    parts = parameters(load_model(str(tmp_path / "preset"), quant_spec=quant_spec, sharding=sharding_of(mesh)))
    # No device got more than an eighth of an array, except of scales in blocks of 256 and of single heads.
    assert max(sizes, default=0) <= 1024 * 64 // 8
    for before, after in zip(whole, parts, strict=True):
        assert before.keys() == after.keys()
        for path, values in before.items():
            assert np.array_equal(values, after[path]), path


@pytest.mark.parametrize("mesh", ["data:2,fsdp:2,model:2", at_night("fsdp:8"), at_night("model:8"), at_night("data:8")])
@pytest.mark.parametrize("quant_spec", [None, QuantSpec("int8"), QuantSpec("nf4", 32, True)], ids=str)
def test_rows_of_an_embedding(rng, mesh, quant_spec):
    sharding = sharding_of(mesh)
    values = rng.standard_normal((256, 64)).astype(np.float32)
    table = quantize(values[..., None], quant_spec) if quant_spec else values
    wanted = dequantize(table)[..., 0] if quant_spec else values
    ids = rng.integers(0, 256, (8, 5)).astype(np.int32)
    found = jax.jit(lambda table, ids: sharded_lookup(sharding, table, ids))(table, ids)
    # XLA fuses the product and the sum of a doubly quantized scale.
    assert np.allclose(found, wanted[ids], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(4, 1), (4, 2), (8, 8), (3, 1)])
def test_attention_kernels_on_each_devices_part(rng, num_heads, num_kv_heads):
    """Splash attention, whose program XLA can't partition (interpreted here), against plain products. Three heads
    can't be cut into four parts, and each device then has all of them.
    """
    sharding = sharding_of("data:2,model:4")
    q = rng.standard_normal((2, 128, num_heads, 16)).astype(np.float32)
    k, v = (rng.standard_normal((2, 128, num_kv_heads, 16)).astype(np.float32) for _ in range(2))
    segments = np.sort(rng.integers(1, 4, (2, 128, 1)), axis=1).astype(np.int32)
    weights = rng.standard_normal(q.shape).astype(np.float32)
    mask = (segments == segments[:, None, :, 0]) & np.tri(128, dtype=bool)

    def on_mesh(q, k, v):
        def kernel(q, k, v, ids):
            return splash_attention(q, k, v, ids[:, :, 0], scale=0.25, window=None, soft_cap=None, interpret=True)

        attended = shard_map_attention(sharding, kernel, q, k, v, jnp.asarray(segments))
        return (attended * weights).sum(), attended

    def plain(q, k, v):
        attended = causal_attention(q, k, v, jnp.asarray(mask), scale=0.25)
        return (attended * weights).sum(), attended

    places = [NamedSharding(sharding.mesh, P("data"))] * 3
    gradient = jax.jit(jax.value_and_grad(on_mesh, (0, 1, 2), has_aux=True), in_shardings=places)
    (_, found), found_gradients = gradient(q, k, v)
    (_, wanted), wanted_gradients = jax.jit(jax.value_and_grad(plain, (0, 1, 2), has_aux=True))(q, k, v)
    assert np.allclose(found, wanted, rtol=0, atol=1e-5)
    for one, other in zip(found_gradients, wanted_gradients, strict=True):
        assert np.allclose(one, other, rtol=0, atol=5e-5)


def test_gathered_weights_are_not_held():
    """Each pass of each micro-batch gathers a block's weights again, within the loop. Else those of all blocks are held
    at once.
    """
    config = Config().replace(
        {"model.source": "tiny:gemma3", "data.max_length": 32, "training.batch_size": 16, "training.method": "full"}
        | {"training.grad_accum_steps": 2, "training.program": "whole"}
    )
    shape = MeshShape(fsdp=8)
    run = abstract_train_state(config, shape, 0.5, sharding_of("fsdp:8").mesh)
    step = make_train_step(run.model, run.optimizer, run.num_targets, 2, sharding=run.sharding)
    text = step.program(run.state, run.frozen, run.batch).as_text()
    kernels = re.findall(r"f32\[(?:64,128|128,64)\]\S* all-gather\(", text)
    assert len(kernels) == 2 * 3 * len(run.model.backbone.transformer_layers)
    entry = text[text.index("\nENTRY") :]
    assert not re.findall(r"f32\[(?:64,128|128,64)\]\S* all-gather\(", entry)
