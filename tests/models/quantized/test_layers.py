"""Quantized layers compute what their dequantized kernels give, train LoRA beside them, and never hold all floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_steps import num_targets, random_batch

from gemma_tune.errors import ModelError
from gemma_tune.models.base_fingerprint import fingerprint
from gemma_tune.models.functional import assign, parameters
from gemma_tune.models.layers import iter_layers, quantized_layers
from gemma_tune.models.load import load_model
from gemma_tune.models.lora.adapter import save_adapter
from gemma_tune.models.lora.enable import merge_lora
from gemma_tune.models.preset import save_preset
from gemma_tune.models.quantized.convert import quantize_layers
from gemma_tune.models.quantized.layers import QuantizedEinsumDense
from gemma_tune.models.quantized.product import quantized_product
from gemma_tune.models.transforms import LoraSettings, transform_for_training
from gemma_tune.quantization.codes import dequantize, quantize
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.atomic_files import CHECKSUMS
from gemma_tune.training.step.loss import make_loss_fn, make_loss_of_hidden
from gemma_tune.training.step.per_block import PerBlockProgram
from gemma_tune.training.step.per_block_gradients import PerBlockGradients

QUANT_SPECS = [QuantSpec("int8"), QuantSpec("int4", 32), QuantSpec("nf4", 32), QuantSpec("nf4", 32, double=True)]


def dequantized(model, family, precision="float32"):
    """Returns a float model with the dequantized values, which the quantized one has to compute the same as."""
    twin = load_model(f"tiny:{family}", precision=precision)
    layers = {layer.path: layer for layer in iter_layers(twin.backbone)}
    for layer in quantized_layers(model.backbone):
        name = "_kernel" if isinstance(layer, QuantizedEinsumDense) else "_embeddings"
        variable = getattr(layers[layer.path], name)
        variable.assign(dequantize(layer.quantized()).reshape(variable.shape))
    return twin


def with_factors(model, seed):
    """Enables LoRA on all linear layers, and returns random factors in which B isn't zero."""
    transform_for_training(model, LoraSettings(4, 8.0, ("all-linear",), 0), packing=True, remat="dots", row_length=64)
    groups, rng = parameters(model), np.random.default_rng(seed)
    return {
        path: jnp.asarray(0.1 * rng.normal(size=value.shape), jnp.float32) for path, value in groups.trainable.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
@pytest.mark.parametrize(
    ("equation", "x_shape", "shape"),
    [
        ("btd,ndh->btnh", (2, 5, 64), (4, 64, 8)),
        ("btnh,nhd->btd", (2, 5, 4, 16), (4, 16, 24)),
        ("btd,df->btf", (2, 5, 64), (64, 24)),
    ],
)
def test_product(rng, quant_spec, equation, x_shape, shape, dtype):
    """A quantized product and its gradient in x are those of the dequantized kernel."""
    x, kernel = jnp.asarray(rng.normal(size=x_shape), dtype), rng.normal(size=shape).astype(np.float32)
    matrix = {"ndh": (4, 64, 8), "nhd": (1, 64, 24), "df": (1, 64, 24)}[equation.split(",")[1].split("-")[0]]
    quantized = jax.tree.map(jnp.asarray, quantize(kernel.reshape(matrix), quant_spec))
    floats = dequantize(quantized, x.dtype).reshape(shape).astype(jnp.float32)
    ours, pullback = jax.vjp(lambda x: quantized_product(equation, shape, False, x, quantized), x)
    theirs, their_pullback = jax.vjp(lambda x: jnp.einsum(equation, x, floats), x.astype(jnp.float32))
    last_bit = 2.0**-8 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=last_bit, atol=1e-5)
    slope = jnp.asarray(rng.normal(size=ours.shape), dtype)
    of_x, wanted = pullback(slope)[0], their_pullback(slope.astype(jnp.float32))[0]
    # Each of four heads has its part of the gradient, rounded before they are added up.
    atol = 4 * last_bit * np.abs(wanted).max() if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(of_x.astype(jnp.float32), wanted, rtol=last_bit, atol=atol)


@pytest.mark.parametrize(
    "quant_spec",
    [
        QUANT_SPECS[1],
        QUANT_SPECS[3],
        *(pytest.param(quant_spec, marks=pytest.mark.nightly) for quant_spec in (QUANT_SPECS[0], QUANT_SPECS[2])),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_the_dequantized_model(some_family, quant_spec, rng):
    model = load_model(f"tiny:{some_family}", quant_spec=quant_spec)
    twin = dequantized(model, some_family)
    batch = jax.tree.map(jnp.asarray, random_batch(rng, (40, 20, 30), 3, 64))
    results = []
    for one in (twin, model):
        factors = with_factors(one, 0)
        loss_fn, frozen = make_loss_fn(one, num_targets(batch)), parameters(one).frozen
        results.append(jax.jit(jax.value_and_grad(lambda t, f=loss_fn, z=frozen: f(t, z, batch).loss_sum))(factors))
    (wanted, gradients), (loss, ours) = results
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    for path, gradient in gradients.items():
        # The same sums in another order; Gemma 4 magnifies roundings the most.
        np.testing.assert_allclose(ours[path], gradient, atol=1e-3 * np.abs(gradient).max(), err_msg=path)


@pytest.mark.parametrize("quant_spec", [QUANT_SPECS[1], QUANT_SPECS[3]], ids=str)
def test_per_block_is_the_whole_program(quant_spec, rng):
    model = load_model("tiny:gemma3", quant_spec=quant_spec)
    factors, frozen = with_factors(model, 0), parameters(model).frozen
    batch = jax.tree.map(jnp.asarray, random_batch(rng, (40, 20, 30), 3, 64))
    loss_fn = make_loss_fn(model, num_targets(batch))
    wanted = jax.jit(jax.grad(lambda t: loss_fn(t, frozen, batch).loss_sum))(factors)
    count = num_targets(batch)
    gradients = PerBlockGradients(PerBlockProgram(model, "none"), {count: make_loss_of_hidden(model, count)})
    for path, gradient in gradients(factors, frozen, None, batch)[0].items():
        np.testing.assert_allclose(gradient, wanted[path], atol=1e-4 * np.abs(wanted[path]).max(), err_msg=path)


def test_no_floats_are_kept_for_the_backward_pass(rng):
    """Also when all activations are kept: only the codes of a kernel go from the forward to the backward program."""
    model = load_model("tiny:gemma3", quant_spec=QuantSpec("nf4", 32))
    factors, frozen = with_factors(model, 0), parameters(model).frozen
    batch = jax.tree.map(jnp.asarray, random_batch(rng, (40,), 1, 64))
    kernels = {layer.kernel.shape for layer in iter_layers(model.backbone, QuantizedEinsumDense)}
    forward = PerBlockProgram(model, "none").forward(factors, frozen, batch)
    kept = {leaf.shape for leaf in jax.tree.leaves(forward.residuals)}
    assert kept and not kept & kernels
    twin = load_model("tiny:gemma3")
    factors, frozen = with_factors(twin, 0), parameters(twin).frozen
    assert len(kernels) > 3 and any(value.shape in kernels for value in frozen.values())


@pytest.mark.parametrize("quant_spec", [QUANT_SPECS[0], QUANT_SPECS[3]], ids=str)
def test_generating_is_that_of_the_dequantized_model(some_family, quant_spec):
    """KerasHub's `generate`, with a KV cache and all logits at once, gives the same tokens."""
    model = load_model(f"tiny:{some_family}", quant_spec=quant_spec)
    wanted = dequantized(model, some_family).generate("How do I", max_length=16)
    assert model.generate("How do I", max_length=16) == wanted


def test_bytes_in_memory():
    """Quantized layers take little more than their codes; norms stay float."""
    floats = sum(value.nbytes for value in parameters(load_model("tiny:gemma3")).trainable.values())
    for quant_spec, most in ((QuantSpec("int8"), 0.28), (QuantSpec("int4"), 0.16), (QuantSpec("nf4"), 0.16)):
        model = load_model("tiny:gemma3", quant_spec=quant_spec)
        groups = parameters(model)
        held = sum(value.nbytes for group in groups for value in group.values())
        assert held <= most * floats, quant_spec


def test_what_cannot_be_quantized():
    model = load_model("tiny:gemma3")
    transform_for_training(model, LoraSettings(4, 8.0, ("query",), 0), packing=True, remat="dots", row_length=64)
    with pytest.raises(ModelError, match="Quantize first, then enable LoRA"):
        quantize_layers(model.backbone, QuantSpec("int8"))
    with pytest.raises(ModelError, match="block_size=256 does not divide its"):
        load_model("tiny:gemma3", quant_spec=QuantSpec("int4", 256))
    quantized = load_model("tiny:gemma3", quant_spec=QuantSpec("int8"))
    with pytest.raises(ModelError, match="can't have LoRA factors"):
        transform_for_training(
            quantized, LoraSettings(4, 8.0, ("token_embedding",), 0), packing=True, remat="dots", row_length=64
        )


def test_lora_is_not_merged_into_codes():
    model = load_model("tiny:gemma3", quant_spec=QuantSpec("nf4", 32))
    with_factors(model, 0)
    with pytest.raises(ModelError, match="without quantization"):
        transform_for_training(model, None, packing=True, remat="dots", row_length=64)


@pytest.mark.parametrize("quant_spec", [QUANT_SPECS[0], QUANT_SPECS[3]], ids=str)
def test_an_adapter_of_a_quantized_model_fits_its_float_base(quant_spec, tmp_path):
    """An adapter loads on the float base too, where merging rounds nothing, but on no other base."""
    model = load_model("tiny:gemma3", quant_spec=quant_spec)
    assign(model, with_factors(model, 0))
    save_adapter(model, tmp_path, base_model="tiny:gemma3")
    base = load_model("tiny:gemma3", adapter=str(tmp_path))
    factors = parameters(model).trainable
    for path, value in parameters(base).trainable.items():
        np.testing.assert_array_equal(value, factors[path])
    merge_lora(base.backbone)
    with pytest.raises(ModelError, match="another base"):
        load_model("tiny:gemma3", seed=1, adapter=str(tmp_path))


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
@pytest.mark.parametrize("quant_spec", [QUANT_SPECS[0], QUANT_SPECS[3]], ids=str)
def test_a_checkpoint_is_quantized_as_it_is_read(quant_spec, tmp_path, name):
    """Quantizing a Keras preset while it is read gives the codes of quantizing the loaded model, and saving keeps them."""
    load_model(f"tiny:{name}").save_to_preset(str(tmp_path / "preset"))
    wanted, model = (load_model(source, quant_spec=quant_spec) for source in (f"tiny:{name}", str(tmp_path / "preset")))
    save_preset(model, tmp_path / "codes")
    again = load_model(str(tmp_path / "codes"))
    assert fingerprint(again) == fingerprint(load_model(f"tiny:{name}"))
    groups = [parameters(one).frozen | parameters(one).trainable for one in (wanted, model, again)]
    for path, value in groups[0].items():
        np.testing.assert_array_equal(groups[1][path], value, err_msg=path)
        np.testing.assert_array_equal(groups[2][path], value, err_msg=path)


def test_what_is_saved_quantized(tmp_path):
    """A preset is saved whole or not at all, replaces nothing, and can't be quantized a second time."""
    model = load_model("tiny:gemma3", quant_spec=QuantSpec("int4", 32))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    with pytest.raises(ModelError, match="exists already"):
        save_preset(model, tmp_path / "taken")
    save_preset(model, tmp_path / "codes")
    with pytest.raises(ModelError, match="held in int4 already"):
        load_model(str(tmp_path / "codes"), quant_spec=QuantSpec("int8"))
    with_factors(model, 0)
    with pytest.raises(ModelError, match="LoRA factors"):
        save_preset(model, tmp_path / "factors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes", "taken"]
    (tmp_path / "codes" / "quantization.json").write_text('{"format": "gemma_tune.quantization", "layers": {"a": {}}}')
    with pytest.raises(ModelError, match="is damaged: .*quantization.json has 58 bytes"):
        load_model(str(tmp_path / "codes"))
    (tmp_path / "codes" / CHECKSUMS).unlink()
    with pytest.raises(ModelError, match="can't be read"):
        load_model(str(tmp_path / "codes"))
