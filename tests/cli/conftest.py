"""Commands as a user types them, and a run that they can be tried on."""

import json
import shutil

import pytest
from helpers.cli_arguments import FAST, NUM_STEPS, TINY

from gemma_tune.cli.main import run


@pytest.fixture
def questions(write):
    rows = [
        {"prompt": f"How do I switch on feature {i}?", "completion": f"Open Settings and tap Feature {i}."}
        for i in range(30)
    ]
    return str(write("questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))


@pytest.fixture
def call(capfd):
    """Runs a command; returns (exit code, stdout, stderr)."""

    def call_with(*arguments):
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call_with


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The workdir of a finished tiny run, made once. Tests that write to it take `own_copy`."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    code = run(
        [
            "train",
            *TINY,
            *FAST,
            f"--workdir={workdir}",
            "--data=sample:smartphone_support",
            "--num_epochs=1",
            f"--config.training.num_train_steps={NUM_STEPS}",
        ]
    )
    assert code == 0
    return workdir


@pytest.fixture
def own_copy(trained, tmp_path):
    """A copy of the run, to change."""
    return shutil.copytree(trained, tmp_path / "copied run")
