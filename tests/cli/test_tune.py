"""`gemma-tune tune` from its forecast to a model that was retrained on all data, and what is refused."""

import json

import pytest

from gemma_tune.cli.config_resolution import load_config_file
from gemma_tune.data.sources.readers import resolve_files

pytest.importorskip("optuna")
TINY = ("--model=tiny", "--max_length=64", "--num_epochs=1", "--batch_size=8", "--lora_rank=2")
SPACE = "optimizer.learning_rate: {low: 1e-3, high: 1e-1, log: true}\nlora_alpha: [2, 8]\n"


@pytest.fixture
def space(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    return f"--space={tmp_path / 'space.yaml'}"


@pytest.fixture
def tune(call, tmp_path, space):
    """`tune(argument, …)` searches with the tiny model and returns the command's JSON object."""

    def run(*arguments):
        code, out, err = call("tune", *TINY, space, f"--workdir={tmp_path / 'search'}", "--json", *arguments)
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.mark.slow
def test_from_the_forecast_to_a_model_trained_on_all_data(tune, call, tmp_path):
    forecast = tune("--budget=3_trials", "--dry_run")
    assert not (tmp_path / "search").exists()  # Nothing was written.
    assert forecast["forecast"]["num_programs"] == 1 and forecast["forecast"]["num_trials"] == 3
    assert forecast["forecast"]["seconds"] > 0 and forecast["forecast"]["memory_bytes"][0] > 0
    found = tune("--budget=3_trials")
    assert found["trials"][0]["state"] == "done" and len(found["trials"]) == 3
    first = found["trials"][0]
    assert (first["optimizer.learning_rate"], first["lora.alpha"]) == (1e-3, 2)  # 5e-4, moved into the space.
    best = min((row for row in found["trials"] if row["state"] == "done"), key=lambda row: row["heldout_loss"])
    (named,) = found["best"]
    assert named["trial"] == best["trial"] and named["values"]["heldout_loss"] == best["heldout_loss"]
    assert first["num_steps"] == forecast["forecast"]["num_steps"]

    # The trial's adapter fits the base, and has the loss that the search says.
    adapter = f"--adapter={named['adapter']}"
    code, out, err = call(
        "eval", "--model=tiny", adapter, "--data=sample:smartphone_support/heldout", "--num_questions=2",
        "--max_new_tokens=2", "--max_length=64", f"--output={tmp_path / 'eval'}", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["tuned"]["loss"] == pytest.approx(best["heldout_loss"], rel=1e-4)

    # The same command goes on: nothing is left to do but the training on all data.
    again = tune("--budget=3_trials", "--retrain")
    assert again["trials"] == found["trials"]
    config = load_config_file(str(tmp_path / "search/best/config.json"))
    num_rows = sum(len(file.read_text().splitlines()) for file in map(_file, ("", "/heldout")))
    num_train = len(_file("").read_text().splitlines())
    assert config.training.num_train_steps == round(again["trials"][best["trial"]]["best_step"] * num_rows / num_train)
    assert again["retrained"]["num_steps"] == config.training.num_train_steps
    assert config.learning_rate == best["optimizer.learning_rate"]


def _file(part):
    (path,) = resolve_files(f"sample:smartphone_support{part}")
    return path


@pytest.mark.nightly
def test_two_workers_find_what_one_finds(tune, call, space, tmp_path):
    """Random trials depend on their number alone, and without pruning their order doesn't matter."""
    alone = tune("--budget=5_trials", "--pruner=none")
    code, out, err = call(
        "tune", *TINY, space, f"--workdir={tmp_path / 'shared'}", "--json", "--budget=5_trials", "--pruner=none",
        "--workers=2",
    )  # fmt: skip
    assert code == 0, err
    shared = json.loads(out)
    kept = ("trial", "state", "heldout_loss", "num_steps", "optimizer.learning_rate", "lora.alpha")
    assert [[row[name] for name in kept] for row in shared["trials"]] == [
        [row[name] for name in kept] for row in alone["trials"]
    ]
    assert {file.name for file in (tmp_path / "shared/workers").glob("*.log")} == {"worker_0.log", "worker_1.log"}


@pytest.mark.nightly
def test_answers_are_a_metric_and_two_metrics_a_front(tune):
    found = tune(
        "--budget=2_trials", "--metric=f1,model_size", "--config.training.num_eval_answers=2",
        "--config.generation.max_new_tokens=4", "--config.training.eval_every_steps=0",
    )  # fmt: skip
    assert found["metrics"] == ["f1", "model_size"] and found["best"]
    assert all(0 <= row["f1"] <= 1 and row["model_size"] > 0 for row in found["trials"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--space=nowhere.yaml",), "--space=nowhere.yaml can't be read"),
        (("--budget=soon",), "--budget=soon can't be read"),
        (("--metric=bleu2",), "there is no metric 'bleu2' for a search. Did you mean bleu?"),
        (("--metric=tool_name",), "tool_name"),
        (("--config.training.mesh=data:2", "--side_by_side=3"), "can't be trained side by side"),
        (("--memory=much",), "--memory"),
    ],
)
def test_what_is_wrong_is_named_before_a_model_is_loaded(call, tmp_path, arguments, message):
    code, _, err = call("tune", *TINY, f"--workdir={tmp_path / 'w'}", *arguments)
    assert code == 2 and message in err, err


def test_a_broken_space_is_named_with_its_file(call, tmp_path):
    (tmp_path / "space.yaml").write_text("lora.rank: [4, 8\n")
    code, _, err = call("tune", *TINY, f"--workdir={tmp_path / 'w'}", f"--space={tmp_path / 'space.yaml'}")
    assert code == 2 and "is not valid YAML" in err
