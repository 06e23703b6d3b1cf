"""Each mesh gives the loss curve of one device, each device holds only its shards, and a run resumes on another mesh."""

import jax
import numpy as np
import pytest

from gemma_tune.config import Config
from gemma_tune.pipeline import read_splits, set_up
from gemma_tune.training.run.checkpoint_content import Progress
from gemma_tune.training.run.checkpoints import Checkpoints

NUM_STEPS = 4
BASE = {
    "model.source": "tiny:gemma3",
    "data.max_length": 64,
    "training.batch_size": 8,
    "training.num_train_steps": NUM_STEPS,
    "training.program": "whole",
    "lora.target_layers": ["all-linear"],
    "optimizer.learning_rate": 0.02,
    "optimizer.warmup_steps": 1,
}
FULL = {"training.method": "full", "optimizer.learning_rate": 0.005}
QLORA = {"training.method": "qlora", "model.block_size": 32}
# Half a unit in the last place of its weights moves a tiny Gemma 4's gradients by 7e-5, thirty times a Gemma 3's, and
# Adam makes large steps of what is small. So a Gemma 4 gets the default rates, which are lower.
GENTLE = {"optimizer.learning_rate": 0.0}
ALL_AXES = "data:2,fsdp:2,model:2"
SLOW = [  # `benchmarks.meshes` tries every family with every method on five meshes.
    ("gemma", {}, ("model:8",)),
    ("gemma2", FULL, (ALL_AXES,)),
    ("gemma3", {}, ("fsdp:8", "data:4,model:2")),
    ("gemma3", {**QLORA, "model.quantize": "int8"}, ("fsdp:2,model:4",)),
    ("gemma3", {"lora.layout": "peft", "lora.use_dora": True}, (ALL_AXES, "fsdp:2,model:4")),
    ("gemma2", {**QLORA, "lora.layout": "peft", "lora.use_dora": True, "lora.use_rslora": True}, (ALL_AXES,)),
    ("gemma", {"lora.use_dora": True, "lora.loraplus_lr_ratio": 4.0}, (ALL_AXES,)),
    ("gemma3", {**QLORA, "model.quantize": "int4"}, ("fsdp:8",)),
    ("gemma3", {**QLORA, "model.double_quant": True}, (ALL_AXES,)),
    ("gemma3", {**FULL, "training.qat": "int4", "model.block_size": 32}, (ALL_AXES,)),
    ("gemma3", {"lora.target_layers": ["token_embedding", "query"], "training.remat": "full"}, (ALL_AXES,)),
    ("gemma3", {**FULL, "optimizer.name": "adafactor", "training.remat": "none"}, ("auto",)),
    ("gemma4", GENTLE, (ALL_AXES,)),
    ("gemma4", {**FULL, **GENTLE}, ("fsdp:2,model:4",)),
]
CASES = [("gemma3", {**FULL, "training.grad_accum_steps": 2}, (ALL_AXES,))]


def prepared(changes):
    config = Config().replace({**BASE, **changes})
    return set_up(config, read_splits(config))


def curve(setup, state=None, first=0, last=NUM_STEPS):
    """Returns (losses of the steps, held-out loss at the end, state)."""
    state, losses = state or setup.state, []
    for step in range(first, last):
        state, metrics = setup.train_step(state, setup.frozen, setup.on_devices(setup.batches)[step])
        losses.append(float(metrics.loss))
    return losses, setup.evaluate(state.trainable)["loss"], state


@pytest.mark.parametrize(
    "family, changes, meshes",
    [*CASES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in SLOW)],
    ids=lambda value: str(value),
)
def test_every_mesh_gives_the_curve_of_one_device(family, changes, meshes):
    changes = {"model.source": f"tiny:{family}", **changes}
    one = prepared(changes)
    before = one.evaluate(one.state.trainable)["loss"]
    losses, heldout, _ = curve(one)
    assert abs(before - heldout) > 1e-3  # A control: the steps change the loss by far more than a mesh may.
    for mesh in meshes:
        setup = prepared({**changes, "training.mesh": mesh})
        of_mesh, heldout_of_mesh, state = curve(setup)
        deviation = max(abs(np.subtract([*of_mesh, heldout_of_mesh], [*losses, heldout])))
        print(f"{family} {changes} {mesh}: {deviation:.1e}")
        assert deviation < 1e-5
        assert_cut(setup, state)


def assert_cut(setup, state):
    """Each weight that the mesh can cut is cut as its rule says, and so is what the optimizer keeps of it."""
    shape = setup.sharding.shape
    for path, array in {**setup.frozen, **state.trainable}.items():
        axes = [axis for entry in array.sharding.spec for axis in ([entry] if isinstance(entry, str) else entry or ())]
        parts = np.prod([setup.sharding.mesh.shape[axis] for axis in axes])
        assert {shard.data.size for shard in array.addressable_shards} == {array.size // parts}, path
        if array.ndim >= 2 and "lora" not in path and not path.endswith(("_step", "_lowest", "_scale", "_zero")):
            codes = path.endswith("attention_output/kernel") and array.shape[0] == 1  # All heads are one axis there.
            few_heads = "/attention/" in path and not codes and array.shape[0] % shape.model
            wanted = shape.fsdp if few_heads else shape.fsdp * shape.model
            assert parts == wanted, path
    largest = max(
        array.nbytes // len({str(s.index) for s in array.addressable_shards})
        for array in jax.tree.leaves(state.opt_state)
    )
    kernels = [array for array in state.trainable.values() if array.ndim >= 2]
    assert largest <= max(4 * array.addressable_shards[0].data.size for array in kernels)


@pytest.mark.nightly
def test_a_checkpoint_goes_on_on_another_mesh(tmp_path):
    losses, heldout, _ = curve(prepared({}))
    first = prepared({"training.mesh": "data:2,fsdp:4"})
    _, _, state = curve(first, last=2)
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(state, Progress())
        assert checkpoints.wait()
        for mesh in ("model:4,fsdp:2", ""):
            other = prepared({"training.mesh": mesh} if mesh else {})
            restored, _ = checkpoints.restore(other.state)
            assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(
                lambda leaf: leaf.sharding, other.state
            )
            rest, heldout_of_mesh, _ = curve(other, restored, first=2)
            assert np.allclose([*rest, heldout_of_mesh], [*losses[2:], heldout], rtol=0, atol=1e-5)


@pytest.mark.nightly
def test_a_step_takes_less_on_each_device():
    from gemma_tune.cli.forecast import step_memory

    one = step_memory(prepared(FULL))
    each = step_memory(prepared({**FULL, "training.mesh": "fsdp:4,model:2"}))
    # The state is 3 × 0.9 MB of weights and moments, an eighth of it here; norms and single heads are on every device.
    assert each.argument_bytes < one.argument_bytes / 6
    assert each.temporary_bytes < one.temporary_bytes / 2
