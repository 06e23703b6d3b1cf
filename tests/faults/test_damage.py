"""Damaged files: each is noticed and named, and what is not lost is used."""

import random
import shutil
import signal

import pytest
from helpers.fault_runs import Fault, differences, outcome, run, start


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The workdir of a run that was killed with some checkpoints behind it."""
    workdir = tmp_path_factory.mktemp("stopped") / "w"
    for at_change in range(60, 200, 8):  # Until there are two checkpoints.
        ended = run(workdir, Fault(signal.SIGKILL, at_change=at_change))
        folder = workdir / "checkpoints"
        if ended.code == 0 or (folder.is_dir() and len([path for path in folder.iterdir() if path.name.isdigit()]) > 1):
            break
        shutil.rmtree(workdir, ignore_errors=True)
    assert ended.code == -signal.SIGKILL
    return workdir


def damage_file(path, generator):
    """Changes a file in one of four ways, and returns which."""
    content = path.read_bytes()
    how = generator.choice(["flip", "cut", "zeros", "remove"] if content else ["remove"])
    if how == "remove":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: generator.randrange(len(content))])
    else:
        start = generator.randrange(len(content))
        length = generator.randint(1, 16)
        part = content[start : start + length]
        is_flip = how == "flip" or not any(part)
        new = bytes(byte ^ generator.randint(1, 255) for byte in part) if is_flip else bytes(len(part))
        path.write_bytes(content[:start] + new + content[start + length :])
    return how


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(24))
def test_any_damaged_file_of_a_run_is_survived(stopped, wanted, tmp_path, seed):
    generator, workdir = random.Random(seed), tmp_path / "w"
    shutil.copytree(stopped, workdir)
    files = sorted(path for path in workdir.rglob("*") if path.is_file() and path.name != ".lock")
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)
    in_checkpoint = [path for path in files if newest in path.parents]
    path = generator.choice(in_checkpoint if seed % 2 else files)
    how = damage_file(path, generator)
    print(f"seed {seed}: {how} {path.relative_to(workdir)}")
    ended = run(workdir)
    assert ended.code == 0 and "Traceback" not in ended.err, ended.err
    # Two files are written last, and not needed: when the checkpoint was begun, and that it was finished.
    if newest in path.parents and (path.parent != newest or path.name == "checksums.json"):
        assert f"The checkpoint of step {newest.name} is damaged" in " ".join(ended.err.split())
    # A row that was damaged in metrics.jsonl is lost; no other.
    different = set(differences(outcome(workdir), wanted))
    assert different <= ({"metrics", "result"} if path.name == "metrics.jsonl" else set())


@pytest.mark.nightly
def test_two_processes_on_one_workdir(tmp_path):
    """The second is refused, and the first isn't disturbed."""
    import time

    workdir = tmp_path / "w"
    more = ("--config.training.num_train_steps=200",)
    first = start(workdir, more=more, log=tmp_path / "first.err")
    deadline = time.monotonic() + 60
    while not (workdir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    second = run(workdir, more=more)
    first.terminate()
    first.join(60)
    assert second.code == 1 and "Another process is training in" in second.err and "Traceback" not in second.err
    assert first.exitcode == 143
    assert run(workdir, more=more).code == 0  # The lock went with its process.


@pytest.mark.nightly
def test_a_damaged_adapter_is_refused(whole, tmp_path):
    from gemma_tune.errors import ModelError
    from gemma_tune.models.load import load_model

    content = (whole / "adapter" / "adapter.safetensors").read_bytes()
    generator = random.Random(0)
    load_model("tiny", adapter=str(whole / "adapter"))
    for trial in range(20):
        place = generator.randrange(len(content))
        path = tmp_path / "adapter.safetensors"
        path.write_bytes(content[:place] + bytes([content[place] ^ generator.randint(1, 255)]) + content[place + 1 :])
        with pytest.raises(ModelError, match="adapter"):
            load_model("tiny", adapter=str(path))
            pytest.fail(f"trial {trial}: byte {place} of {len(content)} was changed, and the adapter loaded")


@pytest.mark.nightly
def test_a_damaged_preset_is_refused(tmp_path):
    from gemma_tune.errors import ModelError
    from gemma_tune.models.load import load_model
    from gemma_tune.models.preset import save_preset

    save_preset(load_model("tiny"), tmp_path / "preset")
    load_model(str(tmp_path / "preset"))
    path, generator = tmp_path / "preset" / "model.weights.h5", random.Random(0)
    damage_file(path, generator)
    with pytest.raises(ModelError, match=r"model\.weights\.h5"):
        load_model(str(tmp_path / "preset"))
