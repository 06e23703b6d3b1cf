"""Several processes that train one model together, on one machine: each has some of eight devices that a CPU counts as."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_tune.cli.main import run as run_here

FEW = (f"--config={Path(__file__).parents[2] / 'configs/two_processes.py'}",)
ALONE = (*FEW, "--mesh=")
WORKER = Path(__file__).parents[1] / "mesh/rows_worker.py"


def start(command, num_processes, *, logs):
    """Starts a command that ends with `--distributed=` or nothing in each of several processes, with eight devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flag = f"--xla_force_host_platform_device_count={8 // num_processes}"
    environment = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    started = []
    for index in range(num_processes):
        with open(logs / f"{index}.out", "w") as out, open(logs / f"{index}.err", "w") as err:
            arguments = [*command[:-1], f"{command[-1]}127.0.0.1:{port},{num_processes},{index}"]
            started.append(subprocess.Popen([sys.executable, *arguments], env=environment, stdout=out, stderr=err))
    return started


def train(workdir, num_processes, logs, mesh="auto"):
    command = ["-m", "gemma_tune", "train", *FEW, f"--workdir={workdir}", f"--mesh={mesh}", "--distributed="]
    return start(command, num_processes, logs=logs)


def wait(started, seconds=280):
    """Returns the exit codes; kills what doesn't end."""
    end = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()


def wait_for(path, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} didn't come"
        time.sleep(0.05)


def said(logs, index):
    return " ".join((logs / f"{index}.err").read_text().split())


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("heldout_loss", "loss") if name in row]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run by one process, on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "w"
    assert run_here(["train", *ALONE, f"--workdir={workdir}"]) == 0
    return workdir


def assert_same(workdir, alone):
    assert losses(workdir) == pytest.approx(losses(alone), rel=0, abs=1e-5)
    assert len(losses(alone)) == 10 + 3 and losses(alone)[0] - losses(alone)[-1] > 0.01  # It learns something.
    found, wanted = (load_file(folder / "adapter/adapter.safetensors") for folder in (workdir, alone))
    for path, factor in wanted.items():
        # Adam divides by the root of squares: where these are small, it is their rounding that moves a factor.
        assert np.abs(found[path] - factor).max() < 2e-3, path
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["10", "8"]


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_each_process_makes_the_rows_of_its_own_devices(tmp_path, num_processes):
    started = start([str(WORKER), ""], num_processes, logs=tmp_path)
    assert wait(started) == [0] * num_processes, said(tmp_path, 0)
    found = [json.loads((tmp_path / f"{index}.out").read_text().splitlines()[-1]) for index in range(num_processes)]
    rows = [set() for _ in found]
    for made, one in zip(rows, found, strict=True):
        for first, stop in one["parts"]:
            assert not made & set(range(first, stop))
            made |= set(range(first, stop))
        assert one["whole"] == list(range(8)) and one["sum"] == 3 * sum(range(8))
    # With data:2,fsdp:2,model:2 each pair of devices has a quarter of the rows.
    assert sum(map(len, rows)) == 8 and set.union(*rows) == set(range(8))


@pytest.mark.slow
def test_two_processes_end_as_one_does(tmp_path, alone):
    assert wait(train(tmp_path / "w", 2, tmp_path, "data:2,fsdp:2,model:2")) == [0, 0], said(tmp_path, 0) + said(
        tmp_path, 1
    )
    assert_same(tmp_path / "w", alone)
    assert "step 10/10" in said(tmp_path, 0) and (tmp_path / "0.out").read_text().count("Saved in") == 1
    assert "step" not in said(tmp_path, 1) and "Saved in" not in (tmp_path / "1.out").read_text()


@pytest.mark.nightly
@pytest.mark.parametrize("killed", [0, 2])
def test_one_of_four_is_killed_all_stop_and_go_on(tmp_path, alone, killed):
    started = train(tmp_path / "w", 4, tmp_path)
    wait_for(tmp_path / "w/checkpoints/4")
    started[killed].kill()
    begin = time.monotonic()
    codes = wait(started)
    assert time.monotonic() - begin < 60 and codes[killed] == -signal.SIGKILL
    for index in {0, 1, 2, 3} - {killed}:
        # Losing process 0, which the others meet at, ends a process in JAX's own way if that is quicker.
        assert codes[index] == 1 or (killed == 0 and codes[index] != 0)
        assert any(word in said(tmp_path, index) for word in ("is gone", "has failed")) or killed == 0
    assert any("Start all processes again with the same command" in said(tmp_path, index) for index in range(4))
    assert wait(train(tmp_path / "w", 4, tmp_path)) == [0] * 4, said(tmp_path, 0)
    assert_same(tmp_path / "w", alone)


@pytest.mark.nightly
def test_a_signal_to_one_stops_all_and_one_process_goes_on(tmp_path, alone):
    started = train(tmp_path / "w", 2, tmp_path)
    wait_for(tmp_path / "w/checkpoints/2")
    started[1].send_signal(signal.SIGTERM)
    assert wait(started) == [143, 143]
    assert "and saved. Run the same command again to go on." in said(tmp_path, 0)
    assert run_here(["train", *ALONE, f"--workdir={tmp_path / 'w'}"]) == 0
    assert_same(tmp_path / "w", alone)


@pytest.mark.nightly
def test_a_workdir_that_is_held_stops_all(tmp_path):
    from gemma_tune.runtime.lock import lock_workdir

    (tmp_path / "w").mkdir()
    with lock_workdir(tmp_path / "w"):
        assert wait(train(tmp_path / "w", 2, tmp_path)) == [1, 1]
    assert "Another process is training" in said(tmp_path, 0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("here", "--distributed=here can't be read. Write auto"),
        ("127.0.0.1:1234,2", "can't be read"),
        ("127.0.0.1:1234,2,2", "of 2 processes it is at most 1"),
        ("127.0.0.1,2,x", "can't be read"),
    ],
)
def test_written_wrongly(tmp_path, capfd, text, message):
    assert run_here(["train", *FEW, f"--workdir={tmp_path / 'w'}", "--mesh=auto", f"--distributed={text}"]) == 2
    assert message in " ".join(capfd.readouterr().err.split())


def test_it_needs_a_mesh(tmp_path, capfd):
    assert run_here(["train", *ALONE, f"--workdir={tmp_path / 'w'}", "--distributed=auto"]) == 2
    assert "--distributed needs --mesh=auto" in capfd.readouterr().err
