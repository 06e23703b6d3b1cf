"""A run that stops at a loss spike goes on as the user says, and ends as one that skipped from the start."""

import json

import pytest
from helpers.fault_runs import differences, outcome, run

from gemma_tune.runtime.atomic_files import CHECKSUMS, write_checksums

# A spike is whatever lies a five-hundredth above the usual; a rate so small that the loss doesn't fall.
SPIKY = (
    "--config.training.loss_spike_factor=1.002",
    "--learning_rate=1e-6",
    "--config.training.num_train_steps=40",
    "--config.training.eval_every_steps=20",
)
SKIP = "--config.training.on_bad_step=skip"


@pytest.mark.nightly
def test_stopped_then_skipped_is_skipped_throughout(tmp_path):
    skipped, stopped = tmp_path / "skipped", tmp_path / "stopped"
    ended = run(skipped, more=(*SPIKY, SKIP))
    assert ended.code == 0 and "was skipped: the loss is" in ended.err, ended.err
    bad = [json.loads(line) for line in (skipped / "bad_steps.jsonl").read_text().splitlines()]
    assert 0 < len(bad) < 20 and all("train.jsonl:" in origin for row in bad for origin in row["examples"])
    ended = run(stopped, more=SPIKY)
    assert ended.code == 1 and f"Step {bad[0]['step']}: the loss is" in ended.err, ended.err
    assert "on_bad_step=skip" in ended.err and "Traceback" not in ended.err
    assert run(stopped, more=(*SPIKY, SKIP)).code == 0
    found, wanted = outcome(stopped), outcome(skipped)
    assert differences(found, wanted) == []


@pytest.mark.nightly
def test_a_run_is_repeated_from_its_workdir(wanted, tmp_path):
    """config.json is enough: another workdir, the same bits."""
    first, again = tmp_path / "first", tmp_path / "again"
    assert run(first).code == 0
    ended = run(again, more=(f"--config={first}", f"--workdir={again}"))
    assert ended.code == 0, ended.err
    assert differences(outcome(again), outcome(first)) == []


@pytest.mark.nightly
def test_changed_versions_and_data_are_said(tmp_path):
    workdir = tmp_path / "w"
    assert run(workdir).code == 0
    assert "Changed since" not in run(workdir).err  # The run of before, again.
    for checkpoint in (workdir / "checkpoints").iterdir():
        file = checkpoint / "about" / "metadata"
        about = json.loads(file.read_text())
        about["versions"] |= {"jax": "0.0.1", "data": "other"}
        file.write_text(json.dumps(about))
        (checkpoint / CHECKSUMS).unlink()
        write_checksums(checkpoint)
    ended = run(workdir)
    said = " ".join(ended.err.split())
    assert ended.code == 0 and "jax 0.0.1 → " in said and "the data, or what cleans and splits it." in said, said
    assert "keras" not in said
