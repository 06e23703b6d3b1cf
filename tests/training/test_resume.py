"""A run that is killed and started again ends with the same bits as one that never was."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

ARGUMENTS = ["train", "--model=tiny", "--max_length=128", "--batch_size=8", "--config.training.num_train_steps=12",
             "--config.training.checkpoint_every_steps=2", "--config.training.eval_every_steps=4", "--config.training.num_sample_answers=1",
             "--config.training.num_scored_answers=1", "--config.generation.max_new_tokens=2"]  # fmt: skip


METHOD = ["--lora_layout=peft", "--use_dora", "--use_rslora", "--loraplus_lr_ratio=4", "--lora_targets=attention"]


def command(workdir, flags=()):
    return [sys.executable, "-m", "gemma_tune", *ARGUMENTS, *flags, f"--workdir={workdir}"]


def rows(workdir):
    """metrics.jsonl without what depends on the clock."""
    clock = ("step_seconds", "tokens_per_second", "input_wait_seconds", "input_wait_share")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in clock} for line in lines]


def run_and_signal(workdir, number, at_step, flags=()):
    """Starts the run and sends a signal once its metrics show a step."""
    process = subprocess.Popen(command(workdir, flags), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        file = workdir / "metrics.jsonl"
        if file.exists() and f'"step": {at_step}, "loss"' in file.read_text():
            break
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait(), process.stderr.read()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "w"
    subprocess.run(command(workdir), check=True, capture_output=True)
    return workdir


@pytest.mark.parametrize(
    ("number", "at_step"),
    [
        (signal.SIGKILL, 5),  # Signals among the default tests: tests/faults.
        pytest.param(signal.SIGTERM, 3, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 7, marks=pytest.mark.slow),
    ],
)
def test_the_end_is_the_same_bit_for_bit(uninterrupted, tmp_path, number, at_step):
    workdir = tmp_path / "w"
    code, err = run_and_signal(workdir, number, at_step)
    if code == 0:
        pytest.skip("the run was over before the signal came")
    if number != signal.SIGKILL:
        assert code == 128 + number
        assert "and saved" in err and "Traceback" not in err
        assert "Run the same command again" in err
    subprocess.run(command(workdir), check=True, capture_output=True)
    ours, wanted = (load_file(path / "adapter" / "adapter.safetensors") for path in (workdir, uninterrupted))
    assert ours.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(ours[name], wanted[name], err_msg=name)
    assert rows(workdir) == rows(uninterrupted)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {
        path.name for path in (uninterrupted / "checkpoints").iterdir()
    }


@pytest.mark.slow
def test_every_kind_of_factors_goes_on(tmp_path):
    first, second = tmp_path / "whole", tmp_path / "w"
    subprocess.run(command(first, METHOD), check=True, capture_output=True)
    run_and_signal(second, signal.SIGKILL, 5, METHOD)
    subprocess.run(command(second, METHOD), check=True, capture_output=True)
    ours, wanted = (load_file(path / "adapter" / "adapter.safetensors") for path in (second, first))
    assert any(name.endswith("_magnitude") for name in wanted) and ours.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(ours[name], wanted[name], err_msg=name)
    assert rows(second) == rows(first)
