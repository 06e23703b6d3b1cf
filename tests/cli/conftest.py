"""Commands as a user types them, and a run that they can be tried on."""

import json

import pytest
from helpers.cli_arguments import FAST, TINY

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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a finished tiny run, made once."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    code = run(
        [
            "train",
            *TINY,
            *FAST,
            f"--workdir={workdir}",
            "--data=sample:smartphone_support",
            "--num_epochs=1",
            "--config.training.num_train_steps=6",
        ]
    )
    assert code == 0
    return workdir
