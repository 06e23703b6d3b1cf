"""The command line with `--mesh`: training, resuming on another mesh, dry runs, and what it says of devices."""

import json

import pytest

from gemma_tune.cli.main import run

FEW = (
    "--model=tiny", "--max_length=64", "--batch_size=8", "--config.training.num_train_steps=4",
    "--config.training.num_sample_answers=1", "--config.training.num_scored_answers=1",
    "--config.generation.max_new_tokens=2",
)  # fmt: skip


def said(capfd):
    return " ".join(capfd.readouterr().err.split())


def test_a_run_goes_on_on_another_mesh_and_ends_with_an_adapter(tmp_path, capfd):
    command = ["train", *FEW, f"--workdir={tmp_path}", "--config.training.checkpoint_every_steps=2"]
    assert run([*command, "--mesh=data:2,fsdp:2,model:2"]) == 0
    assert "Mesh: data:2,fsdp:2,model:2 of 8 × cpu" in said(capfd)
    assert run([*command, "--mesh=fsdp:4"]) == 0
    assert "Resuming from the checkpoint of step 4" in said(capfd)
    assert (tmp_path / "adapter/adapter.safetensors").exists()
    capfd.readouterr()
    answers, scores = [], []
    for mesh in ([], ["--mesh=fsdp:2,model:4"]):
        generate = ["generate", f"--model={tmp_path}", "--max_new_tokens=6", "--json", *mesh]
        assert run([*generate, "How do I reset it?", "And then?"]) == 0
        answers.append(json.loads(capfd.readouterr().out)["answers"])
        assert run(["eval", f"--model={tmp_path}", "--max_length=64", "--json", *mesh]) == 0
        scores.append(json.loads(capfd.readouterr().out))
    assert answers[0] == answers[1]
    for name in ("base", "tuned"):
        assert scores[1][name] == pytest.approx(scores[0][name], abs=1e-5, rel=1e-5)


@pytest.mark.nightly
def test_a_dry_run_says_what_each_device_takes(tmp_path, capfd):
    assert run(["train", *FEW, "--method=full", "--dry_run", "--json", f"--workdir={tmp_path}"]) == 0
    one = json.loads(capfd.readouterr().out)["memory"]
    assert run(["train", *FEW, "--method=full", "--dry_run", "--mesh=auto", f"--workdir={tmp_path}"]) == 0
    assert "memory of a step on each device" in capfd.readouterr().out
    assert run(["train", *FEW, "--method=full", "--dry_run", "--json", "--mesh=auto", f"--workdir={tmp_path}"]) == 0
    each = json.loads(capfd.readouterr().out)["memory"]
    assert each["argument_bytes"] < one["argument_bytes"] / 6


@pytest.mark.nightly
def test_without_a_mesh_one_device_is_taken_and_that_is_said(tmp_path, capfd):
    assert run(["train", *FEW, f"--workdir={tmp_path}"]) == 0
    assert "This run uses one of 8 devices. --mesh=auto uses all." in said(capfd)


@pytest.mark.nightly
def test_more_devices_than_there_are(tmp_path, capfd):
    assert run(["train", *FEW, "--mesh=fsdp:2,model:8", f"--workdir={tmp_path}"]) == 1
    assert "needs 16 devices, but this run has 8 (cpu)" in said(capfd)


@pytest.mark.nightly
def test_answers_during_training_are_those_of_one_device(tmp_path):
    found = {}
    for name, mesh in (("one", []), ("mesh", ["--mesh=data:2,fsdp:2,model:2"])):
        metrics = ["--best_by=f1", "--config.training.num_eval_answers=9", f"--workdir={tmp_path / name}"]
        assert run(["train", *FEW, *metrics, *mesh]) == 0
        lines = [path.read_text().splitlines() for path in sorted((tmp_path / name / "answers").iterdir())]
        found[name] = [[json.loads(line)["answer"] for line in step] for step in lines]
    assert [len(step) for step in found["one"]] == [9, 9]
    assert found["one"] == found["mesh"]
