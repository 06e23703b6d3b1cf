"""What a search leaves: files, the live table, the forecast, and settings to train with on all data."""

import csv
import io
import re

import pytest
from rich.console import Console

from gemma_tune.cli.config_resolution import load_config_file
from gemma_tune.config import Config
from gemma_tune.data.splits import load_splits
from gemma_tune.errors import ConfigError
from gemma_tune.runtime import progress
from gemma_tune.tuning.forecast import share_above
from gemma_tune.tuning.results.live_table import LiveTable
from gemma_tune.tuning.results.result_files import write_results
from gemma_tune.tuning.results.retrain import on_all_data
from gemma_tune.tuning.study import best_trials, run_search
from tests.helpers.scripted_search import Curve, search

pytest.importorskip("optuna")


def test_files_say_what_the_study_knows(tmp_path):
    searched = search(tmp_path, "10_trials", pruner="none")
    study = run_search(searched, Curve())
    findings = write_results(searched, study)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "trials.csv").read_text())))
    assert [row["trial"] for row in rows] == [str(number) for number in range(10)]
    (best,) = best_trials(study)
    row = min(rows, key=lambda row: float(row["heldout_loss"]))
    assert float(row["heldout_loss"]) == best.value == findings["best"][0]["values"]["heldout_loss"]
    config = load_config_file(str(tmp_path / "best.py"))
    assert config.lora.rank == int(row["lora.rank"])
    assert config.learning_rate == float(row["optimizer.learning_rate"])
    assert config.workdir == str(tmp_path / "best")
    assert sum(findings["importances"].values()) == pytest.approx(1)
    # Loss depends on these two alone.
    assert set(list(findings["importances"])[:2]) <= {"optimizer.learning_rate", "lora.rank"} or (
        next(iter(findings["importances"])) == "optimizer.learning_rate"
    )
    report = (tmp_path / "report.html").read_text()
    for heading in ("History", "Importances", "What each setting is worth", "Slices", "Parallel coordinates"):
        assert f"<h2>{heading}</h2>" in report
    assert not re.search(r'(src|href)="https?:|url\(https?:|@import', report)  # It works offline.


def test_the_pareto_front_is_drawn_and_each_of_its_trials_has_a_config(tmp_path):
    searched = search(tmp_path, "12_trials", metric="heldout_loss,model_size")
    findings = write_results(searched, run_search(searched, Curve()))
    assert "<h2>Pareto front</h2>" in (tmp_path / "report.html").read_text()
    files = ["best.py", *(f"best_{index}.py" for index in range(2, len(findings["best"]) + 1))]
    for name, best in zip(files, findings["best"], strict=True):
        assert load_config_file(str(tmp_path / name)).lora.rank == best["params"]["lora.rank"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_table_shows_trials_the_best_and_the_time_left(tmp_path, monkeypatch, is_terminal):
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, force_terminal=is_terminal, width=120))
    searched = search(tmp_path, "6_trials")
    study = searched.open()
    with LiveTable(searched, study) as table:
        run_search(searched, Curve(), table)
    text = stream.getvalue()
    best = min(trial.value for trial in study.trials if trial.state.name == "COMPLETE")
    assert f"heldout_loss {best:.5g}" in text and "as given" in text and "elapsed" in text
    if not is_terminal:
        assert [line.split(":")[0] for line in text.splitlines()] == [f"trial {number}" for number in range(6)]
        assert "about 0:00 left" in text.splitlines()[-1]
        assert "pruned" in text


def test_a_table_without_a_terminal_says_that_the_search_goes_on(tmp_path, monkeypatch):
    run_search(search(tmp_path, "2_trials"), Curve())
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, width=120))
    searched = search(tmp_path, "3_trials")
    with LiveTable(searched, searched.open()) as table:
        run_search(searched, Curve(), table)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "The search goes on after 2 trials." and len(lines) == 2 and lines[1].startswith("trial 2:")


def test_the_share_of_steps_that_pruning_leaves():
    """Rungs at 1/9, 1/3 and the end: all go to the first, a third to the second, a ninth to the end."""
    assert share_above(50, 450, 3) == pytest.approx(1 / 9 + 1 / 3 * 2 / 9 + 1 / 9 * 6 / 9)
    assert share_above(450, 450, 3) == 1


def test_all_data_is_trained_on_as_often(tmp_path):
    rows = [f'{{"question": "Where is part {number}?", "answer": "In box {number}."}}' for number in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows[:40]))
    (tmp_path / "b.jsonl").write_text("\n".join(rows[40:]))

    def num_train(config):
        data = config.data
        splits = load_splits(
            data.source, [], eval_source=data.eval_source, split=data.split, eval_split=data.eval_split,
            eval_fraction=data.eval_fraction, system_prompt="", on_error="raise", dedup="normalized",
            near_dedup_threshold=0.0, seed=0,
        )  # fmt: skip
        return len(splits.train), len(splits.heldout)

    config = Config().replace({"data.source": str(tmp_path / "a.jsonl"), "data.eval_source": str(tmp_path / "b.jsonl")})
    assert num_train(config) == (40, 20)
    whole = on_all_data(config, 100, 40, 20)
    assert num_train(whole) == (60, 0) and whole.training.num_train_steps == 150
    one_file = Config().replace({"data.source": str(tmp_path / "a.jsonl"), "data.eval_fraction": 0.25})
    train, heldout = num_train(one_file)
    whole = on_all_data(one_file, 100, train, heldout)
    assert num_train(whole) == (40, 0) and whole.training.num_train_steps == round(100 * 40 / train)
    sample = on_all_data(Config().replace({"data.source": "sample:smartphone_support"}), 10, 330, 66)
    assert (
        sum(num_train(sample))
        == num_train(sample)[0]
        == sum(num_train(Config().replace({"data.source": "sample:smartphone_support"})))
    )
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "train.jsonl").write_text("\n".join(rows[:30]))
    (tmp_path / "sets" / "test.jsonl").write_text("\n".join(rows[40:]))
    folder = Config().replace({"data.source": str(tmp_path / "sets"), "data.eval_split": "test"})
    assert num_train(folder) == (30, 20)
    assert num_train(on_all_data(folder, 100, 30, 20)) == (50, 0)
    (tmp_path / "both.json").write_text(f'{{"train": [{rows[0]}], "test": [{rows[1]}]}}')
    with pytest.raises(ConfigError, match="can't be read as one"):
        on_all_data(folder.replace({"data.source": str(tmp_path / "both.json")}), 10, 1, 1)
    tfds = Config().replace({"data.source": "tfds:a", "data.split": "train", "data.eval_split": "test"})
    assert on_all_data(tfds, 10, 90, 10).data.split == "train+test"
    with pytest.raises(ConfigError, match="can't be read as one"):
        on_all_data(tfds.replace({"data.eval_source": str(tmp_path / "b.jsonl")}), 10, 90, 10)
