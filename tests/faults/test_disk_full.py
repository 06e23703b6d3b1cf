"""A full disk: saving stops with a message, the run and its last good checkpoint stay, and room makes it go on."""

import contextlib
import shutil
import subprocess

import pytest
from helpers.fault_runs import differences, outcome, run


@contextlib.contextmanager
def small_disk(folder, size):
    """Mounts a tmpfs; for root alone."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk can't be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
@pytest.mark.nightly
@pytest.mark.parametrize("size_kb", [24, 300, 600, 1200])
def test_a_full_disk_loses_nothing(wanted, tmp_path, size_kb):
    disk = tmp_path / "disk"
    with small_disk(disk, f"{size_kb}k"):
        workdir = disk / "w"
        (disk / "fill").write_bytes(bytes(size_kb * 512))
        ended = run(workdir)
        text = " ".join(ended.err.split())
        assert "Traceback" not in ended.err, ended.err
        assert ended.code in (0, 1) and "can't be written" in text, ended.err
        if ended.code:
            assert "No space left" in ended.err.splitlines()[-1], ended.err
        (disk / "fill").unlink()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        ended = run(workdir)
        assert ended.code == 0, ended.err
        found = outcome(workdir)
        assert found["checkpoints"][-1] == wanted["checkpoints"][-1]  # Others may be those that found room.
        assert set(differences(found, wanted)) <= {"checkpoints"}


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
@pytest.mark.slow
def test_training_goes_on_without_room_for_a_checkpoint(tmp_path):
    """Room is made while it runs: the checkpoints from then on are there."""
    import jax.numpy as jnp
    import numpy as np
    import optax

    from gemma_tune.training.run.checkpoint_content import Progress
    from gemma_tune.training.run.checkpoints import Checkpoints
    from gemma_tune.training.state import TrainState

    disk = tmp_path / "disk"
    with small_disk(disk, "3m"):
        problems = []

        def state(step):
            # Random: zeros would be compressed away.
            values = jnp.asarray(np.random.default_rng(step).normal(size=150_000), jnp.float32)
            return TrainState(jnp.int32(step), {"w": values}, optax.EmptyState())

        with Checkpoints(disk / "checkpoints", 1, on_problem=problems.append) as checkpoints:
            checkpoints.save(state(1), Progress())
            assert checkpoints.wait() and checkpoints.steps == [1]
            (disk / "fill").write_bytes(bytes(2_000_000))
            checkpoints.save(state(2), Progress())
            assert not checkpoints.wait() and checkpoints.steps == [1]
            assert (
                len(problems) == 1
                and "step 2 can't be written" in problems[0]
                and "needs 0.7 MB, and the disk has" in problems[0]
            )
            assert "Good checkpoints: 1" in problems[0]
            (disk / "fill").unlink()
            checkpoints.save(state(3), Progress())
            assert checkpoints.wait() and checkpoints.steps == [3]
            restored, _ = checkpoints.restore(state(0))
            assert (restored.trainable["w"] == state(3).trainable["w"]).all()
        assert {path.name for path in (disk / "checkpoints").iterdir()} == {"3"}
