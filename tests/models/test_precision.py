"""Precisions that suit a device, and values that float16 can't hold."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_tune.config_checks import PRECISIONS
from gemma_tune.errors import ModelError
from gemma_tune.models import precision as precision_module
from gemma_tune.models.attention.choice import Device
from gemma_tune.models.functional import variables_by_path
from gemma_tune.models.load import load_model
from gemma_tune.models.lora.adapter import load_adapter, save_adapter
from gemma_tune.models.lora.enable import enable_lora
from gemma_tune.models.precision import check_precision, computes_in_float16, suitable_precisions

CPU, TPU, ROCM = (Device(platform) for platform in ("cpu", "tpu", "rocm"))
TURING, AMPERE, HOPPER = (Device("cuda", capability) for capability in ((7, 5), (8, 0), (9, 0)))


@pytest.mark.parametrize(
    ("device", "precision", "said"),
    [
        (CPU, "float32", ""),
        (CPU, "mixed_bfloat16", "On a CPU, mixed_bfloat16 is slower than float32. The fastest here is --precision=float32."),
        (CPU, "float16", "On a CPU, float16 is slower than float32. It halves the memory of weights. The fastest"),
        (TURING, "bfloat16", "This GPU (compute capability 7.5) has no bfloat16 arithmetic, so bfloat16 is slow. Take --precision=float16."),
        (TURING, "mixed_bfloat16", "Take --precision=mixed_float16."),
        (TURING, "mixed_float16", ""),
        (AMPERE, "bfloat16", ""),
        (HOPPER, "mixed_float16", ""),
        (ROCM, "mixed_bfloat16", ""),
        (TPU, "mixed_bfloat16", ""),
    ],
)  # fmt: skip
def test_what_speaks_against_a_precision(monkeypatch, device, precision, said):
    monkeypatch.setattr(precision_module, "multiplies_bfloat16", lambda: False)
    found = check_precision(device, precision)
    assert said in found and bool(found) == bool(said)


def test_tpus_have_no_float16():
    for precision, instead in (("float16", "bfloat16"), ("mixed_float16", "mixed_bfloat16")):
        with pytest.raises(ModelError, match=f"TPUs don't compute in float16. Take --precision={instead}\\."):
            check_precision(TPU, precision)


@pytest.mark.parametrize("precision", ["bfloat16", "mixed_bfloat16"])
def test_nothing_speaks_against_bfloat16_on_a_cpu_that_multiplies_it(monkeypatch, precision):
    monkeypatch.setattr(precision_module, "multiplies_bfloat16", lambda: True)
    assert check_precision(CPU, precision) == ""
    assert "slower" in check_precision(CPU, precision.replace("bfloat16", "float16"))


@pytest.mark.parametrize("multiplies", [False, True])
def test_every_device_has_precisions_that_suit(monkeypatch, multiplies):
    monkeypatch.setattr(precision_module, "multiplies_bfloat16", lambda: multiplies)
    assert suitable_precisions(CPU) == ["float32", *(["bfloat16", "mixed_bfloat16"] if multiplies else [])]
    assert suitable_precisions(TURING) == ["float32", "float16", "mixed_float16"]
    assert suitable_precisions(TPU) == ["float32", "bfloat16", "mixed_bfloat16"]
    assert suitable_precisions(HOPPER) == list(PRECISIONS)


def test_models_that_compute_in_float16(tiny):
    found = {precision: computes_in_float16(tiny(precision=precision)) for precision in PRECISIONS}
    assert [precision for precision, yes in found.items() if yes] == ["float16", "mixed_float16"]


def test_a_weight_beyond_float16_is_named(tiny, tmp_path):
    """The largest float16 value loads, and the next one is refused; bfloat16 holds both."""
    model = tiny("gemma")
    kernel = model.backbone.transformer_layers[1].ffw_linear._kernel
    for value, fits in ((65504.0, True), (65520.0, False)):
        kernel.assign(np.full(kernel.shape, value, np.float32))
        model.save_to_preset(str(tmp_path / str(value)))
        load_model(str(tmp_path / str(value)), precision="bfloat16")
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            if fits:
                load_model(str(tmp_path / str(value)), precision="float16")
                continue
            with pytest.raises(
                ModelError, match=r"decoder_block_1/ffw_linear/kernel has a value beyond 65504.*bfloat16"
            ):
                load_model(str(tmp_path / str(value)), precision="float16")


def test_a_weight_that_streams_in_is_named_without_numpys_warning(monkeypatch):
    from gemma_tune.models.sources import tiny as tiny_module

    monkeypatch.setattr(tiny_module, "_random_value", lambda variable, seed: np.full(variable.shape, 1e5, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(ModelError, match="has a value beyond 65504"):
            load_model("tiny:gemma", precision="float16")


@pytest.mark.parametrize(
    ("trained_in", "loaded_in"), [("float32", "float16"), ("float16", "bfloat16"), ("bfloat16", "float16")]
)
def test_an_adapter_knows_its_base_through_float16s_rounding(tiny, rng, tmp_path, trained_in, loaded_in):
    model = tiny(precision=trained_in)
    enable_lora(model.backbone, 2, 2.0, ("query",), seed=0)
    for variable in model.backbone.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    save_adapter(model, tmp_path, "tiny:gemma3")
    other = tiny(precision=loaded_in)
    load_adapter(other, tmp_path)
    ours, wanted = variables_by_path(other), variables_by_path(model)
    for variable in model.backbone.trainable_variables:
        assert ours[variable.path].dtype == "float32"
        np.testing.assert_array_equal(ours[variable.path].value, wanted[variable.path].value)
    for another in (
        tiny(precision=loaded_in, seed=1),
        tiny("gemma", precision=loaded_in),
        changed(tiny(precision=loaded_in)),
    ):
        with pytest.raises(ModelError, match="was trained on another base"):
            load_adapter(another, tmp_path)


def changed(model):
    """Changes each weight by up to two per cent, as fine-tuning does."""
    rng = np.random.default_rng(0)
    for variable in model.backbone.variables:
        value = jnp.asarray(variable.value, jnp.float32)
        variable.assign(value * jnp.asarray(1 + 0.02 * rng.standard_normal(value.shape), jnp.float32))
    return model
