"""Tests of the predictions for devices that need not be present."""

import math

import jax
import pytest

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError, ModelError
from gemma_tune.mesh import MeshShape
from gemma_tune.models.sources import published_sizes as architectures
from gemma_tune.pipeline import read_splits, set_up
from gemma_tune.planning.abstract_train_state import abstract_train_state, with_batch_size
from gemma_tune.planning.calibrate import calibrated
from gemma_tune.planning.device_sizes import device_sizes
from gemma_tune.planning.duration import planned_step, step_flops
from gemma_tune.planning.hardware import HARDWARE, find_hardware, usable_bytes
from gemma_tune.planning.plan import first_fitting_change, make_plans, mesh_shape
from gemma_tune.planning.step_memory import planned_memory

ONE = MeshShape()
V5E = HARDWARE["v5e"]


def config(**settings):
    base = {"model.source": "gemma3_270m", "training.program": "whole", "lora.target_layers": ["all-linear"]}
    return Config().replace({**base, **{name.replace("__", "."): value for name, value in settings.items()}})


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_arguments_of_a_step_are_those_of_a_real_run(family, method):
    """Shape by shape: weights, LoRA factors or all weights, optimizer state and batch."""
    if family == "gemma4" and method == "qlora":
        pytest.skip("block_size=64 does not divide the inputs of tiny Gemma 4's layers")
    small = config(model__source=f"tiny:{family}", data__max_length=32, training__method=method)
    setup = set_up(small, read_splits(small))
    run = abstract_train_state(small, ONE, 0.5)
    found, wanted = (
        jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)
        for tree in ((run.state, run.frozen), (setup.state, setup.frozen))
    )
    assert found == wanted
    assert run.batch.token_ids.shape == setup.batches[0].token_ids.shape


@pytest.mark.nightly
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"training__remat": "full", "data__max_length": 1024},
        {"training__remat": "none"},
        {"training__method": "full", "training__grad_accum_steps": 2},
    ],
)
def test_memory_is_what_a_compiled_step_takes(settings, monkeypatch):
    """Within 10 %, the bound of `python -m benchmarks.plan`, which also has meshes."""
    sizes = architectures.preset_sizes
    monkeypatch.setattr(
        architectures, "preset_sizes", lambda name: (sizes(name)[0], {**sizes(name)[1], "num_layers": 3})
    )
    run = abstract_train_state(config(**settings), ONE, 0.6)
    assert planned_memory(run).total == pytest.approx(run.compiled_memory().total_bytes, rel=0.1)


def test_a_mesh_divides_the_memory_of_what_it_shards():
    full = config(training__method="full", training__batch_size=8)
    whole, parts, copies = (
        planned_memory(abstract_train_state(full, shape, 0.6)) for shape in (ONE, MeshShape(fsdp=8), MeshShape(data=8))
    )
    assert parts.optimizer_state == pytest.approx(whole.optimizer_state / 8, rel=2e-3)  # Norms are on every device.
    assert copies.optimizer_state == whole.optimizer_state
    assert parts.total < whole.total / 4 < copies.total


def test_flops_are_those_of_the_definition():
    """Frozen products: 2 per weight and token forward, 2 backward; the LM head the same where there is a loss. The rest
    is attention, counted here by hand: scores and values over half a row, forward, recomputed and twice backward.
    """
    run = abstract_train_state(config(training__batch_size=1, data__max_length=512, training__remat="none"), ONE, 0.5)
    layer = 640 * 256 * (4 + 1 + 1 + 4) + 3 * 640 * 2048
    weights = 4 * 18 * layer * 512 + 4 * 262_144 * 640 * 256
    attention = 4 * 18 * (2 * 2 * 4 * 256 * 512 * 512 / 2)
    assert step_flops(device_sizes(run), run.config, ONE) == pytest.approx(weights + attention)


def test_time_follows_what_bounds_it():
    many, few = (
        planned_step(
            abstract_train_state(config(training__batch_size=rows, model__precision="bfloat16"), ONE, 0.6), V5E
        )
        for rows in (32, 1)
    )
    assert many.bound_by == "arithmetic" and many.seconds == many.compute_seconds
    slow = V5E._replace(memory_bandwidth=V5E.memory_bandwidth / 1000)
    run = abstract_train_state(config(training__batch_size=1), ONE, 0.6)
    assert planned_step(run, slow).bound_by == "memory"
    spread = abstract_train_state(config(training__batch_size=4), MeshShape(model=4), 0.6)
    assert planned_step(spread, V5E._replace(link_bandwidth=1e6)).bound_by == "connection"
    assert few.seconds < many.seconds < 32.01 * few.seconds


def test_the_largest_batch_is_the_largest():
    (plan,) = make_plans(config(training__batch_size=4), MeshShape(fsdp=4), 0.6, [V5E])
    run = abstract_train_state(config(training__batch_size=4), MeshShape(fsdp=4), 0.6)
    usable, largest = usable_bytes(V5E), plan.max_batch_size
    assert largest % 4 == 0 and largest > 4
    assert planned_memory(with_batch_size(run, largest)).total <= usable
    assert planned_memory(with_batch_size(run, largest + 4)).total > usable


@pytest.mark.nightly
def test_a_run_that_does_not_fit_gets_a_change_with_which_it_fits():
    large = config(model__source="gemma3_12b", model__precision="bfloat16")
    (plan,) = make_plans(large, ONE, 0.6, [V5E])
    assert not plan.fits and plan.max_batch_size == 0
    assert first_fitting_change(large, ONE, 0.6, V5E) == "--method=qlora"
    quantized = large.replace({"training.method": "qlora"})
    assert make_plans(quantized, ONE, 0.6, [V5E])[0].fits
    assert first_fitting_change(large.replace({"training.method": "full"}), ONE, 0.6, HARDWARE["t4"]).startswith(
        "--mesh=fsdp:"
    )


def test_calibrating_gives_back_what_was_measured():
    some, seconds = config(training__batch_size=1), 3.3
    slow_chip = V5E._replace(flops_32=200e9)
    chip = calibrated(slow_chip, some, ONE, 0.6, seconds)
    assert planned_step(abstract_train_state(some, ONE, 0.6), chip).seconds == pytest.approx(seconds)
    assert 0 < chip.mfu < 1
    with pytest.raises(ConfigError, match="can't have run on v5e"):
        calibrated(slow_chip, some, ONE, 0.6, 0.01)


def test_wrong_meshes_and_names_are_refused():
    assert mesh_shape("auto", 8, 4) == MeshShape(fsdp=4, model=2)
    assert mesh_shape("", 0, 4) == ONE
    with pytest.raises(ConfigError, match="needs 4 devices, but --num_devices=8"):
        mesh_shape("fsdp:4", 8, 4)
    with pytest.raises(ConfigError, match="Did you mean v5"):
        find_hardware("v5f")
    with pytest.raises(ModelError, match="not known without its weights"):
        abstract_train_state(config(model__source="gemma4_2b"), ONE, 0.6)


@pytest.mark.parametrize("name", ["gemma_2b_en", "gemma2_9b_en", "gemma3_27b"])
def test_published_sizes_have_the_published_number_of_parameters(name):
    """KerasHub's presets say how many parameters they have; that of a multimodal one counts its vision part too."""
    from gemma_tune.models.sources.preset_catalog import presets

    published = {preset.name: preset.num_params for preset in presets()}[name]
    run = abstract_train_state(config(model__source=name, training__method="full"), ONE, 0.6)
    found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((run.state.trainable, run.frozen)))
    assert published * (0.98 if name == "gemma3_27b" else 1) <= found <= published
