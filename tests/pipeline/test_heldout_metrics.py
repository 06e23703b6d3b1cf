"""Metrics of answers during training, on a tiny model."""

import json
import logging
import os
import shutil
import signal

import jax
import pytest

from gemma_tune import Config, pipeline
from gemma_tune.errors import ConfigError
from gemma_tune.evaluation.metrics.choice import METRICS
from gemma_tune.pipeline import training_run
from gemma_tune.pipeline.heldout_metrics import (
    best_is_highest,
    heldout_questions,
    read_step_answers,
    write_step_answers,
)
from gemma_tune.pipeline.setup import read_splits
from gemma_tune.runtime.interrupts import Interrupted
from gemma_tune.serving.generation import generate
from gemma_tune.training.run.loop import Loop
from gemma_tune.training.run.metrics import read_metrics


def config_of(workdir, **settings):
    return Config().replace({
        "workdir": str(workdir), "model.source": "tiny", "data.max_length": 64, "training.batch_size": 4,
        "training.num_train_steps": 6, "training.eval_every_steps": 2, "training.num_sample_answers": 1,
        "training.num_scored_answers": 0, "generation.max_new_tokens": 6, "optimizer.learning_rate": 0.05,
        "training.eval_metrics": ("f1", "length_words"), "training.num_eval_answers": 10, "training.best_by": "f1",
        **{name.replace("__", "."): value for name, value in settings.items()},
    })  # fmt: skip


@pytest.mark.slow
def test_figures_are_those_of_the_answers_that_are_kept(tmp_path, monkeypatch, caplog):
    """And the answers of the best step are those of the saved model. Generating is compiled at step 0 alone."""
    config = config_of(tmp_path / "w")
    num_compiled = {}

    def count(workdir, step, rows):
        write_step_answers(workdir, step, rows)
        num_compiled[step] = sum("Compiling jit(_step_fn)" in record.getMessage() for record in caplog.records)

    monkeypatch.setattr(training_run, "write_step_answers", count)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        result = pipeline.run_training(config)
    caplog.clear()
    assert num_compiled[0] == num_compiled[6] > 0
    questions = heldout_questions(config, read_splits(config))
    rows = {row["step"]: row for row in read_metrics(tmp_path / "w") if "heldout_loss" in row}
    assert sorted(rows) == [0, 2, 4, 6]
    for step, row in rows.items():
        answers = read_step_answers(tmp_path / "w", step)
        assert len(answers) == 10
        for name in ("f1", "length_words"):
            statistics = METRICS[name].statistics(questions.cases, answers)
            assert row[f"heldout_{name}"] == pytest.approx(float(METRICS[name].figure(statistics.sum(0))))
    best = max(rows, key=lambda step: rows[step]["heldout_f1"])
    assert result.best_step == (best or 6), "before the first step nothing is saved"
    prompts = [case.prompt for case in questions.cases]
    assert read_step_answers(tmp_path / "w", result.best_step) == generate(result.model, prompts, max_new_tokens=6)
    assert len({tuple(read_step_answers(tmp_path / "w", step)) for step in rows}) > 1, "training changes answers"
    saved = json.loads((tmp_path / "w" / "result.json").read_text())
    assert saved["best_by"] == "f1" and saved["heldout_after"]["f1"] == rows[result.best_step]["heldout_f1"]
    interval = saved["heldout_intervals"]["after"]["f1"]
    assert interval["low"] <= interval["value"] == saved["heldout_after"]["f1"] <= interval["high"]


@pytest.mark.nightly
def test_a_stopped_run_ends_with_the_same_figures_and_answers(tmp_path, monkeypatch):
    pipeline.run_training(config_of(tmp_path / "whole"))
    log = Loop._log

    def log_and_stop(loop, step, *arguments):
        log(loop, step, *arguments)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_log", log_and_stop)
        with pytest.raises(Interrupted):
            pipeline.run_training(config_of(tmp_path / "stopped"))
    pipeline.run_training(config_of(tmp_path / "stopped"))
    found, wanted = (
        [row for row in read_metrics(tmp_path / name) if "heldout_f1" in row] for name in ("stopped", "whole")
    )
    assert found == wanted
    for name in ("stopped", "whole"):
        shutil.rmtree(tmp_path / name / "checkpoints")
    for path in sorted((tmp_path / "whole" / "answers").iterdir()):
        assert (tmp_path / "stopped" / "answers" / path.name).read_bytes() == path.read_bytes()


def test_questions_are_held_out_and_the_same_each_time(tmp_path):
    config = config_of(tmp_path)
    splits = read_splits(config)
    first, second = (heldout_questions(config, splits) for _ in range(2))
    assert first.cases == second.cases and len(first.cases) == 10
    assert [metric.name for metric in first.metrics] == ["f1", "length_words"]
    assert {case.origin for case in first.cases} <= {example.origin for example in splits.heldout}
    assert heldout_questions(config_of(tmp_path, training__eval_metrics=(), training__best_by="loss"), splits) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training.best_by": "rouge3"}, "training.best_by must be one of loss.*got 'rouge3'. Did you mean rouge"),
        ({"training.best_by": "length_words"}, "neither more nor less of it is better"),
        ({"training.eval_metrics": ("f1", "rouge3")}, "There is no metric 'rouge3'. Did you mean"),
        ({"training.eval_metrics": ("json_schema",)}, "json_schema doesn't suit this data.*Metrics that do: .*f1"),
    ],
)
def test_a_metric_that_cannot_be_used_is_refused_before_a_model_is_loaded(tmp_path, settings, message):
    config = config_of(tmp_path).replace(settings)
    with pytest.raises(ConfigError, match=message):
        heldout_questions(config, read_splits(config))


@pytest.mark.parametrize(("name", "is_highest"), [("loss", False), ("token_accuracy", True), ("f1", True)])
def test_which_value_is_the_best(name, is_highest):
    assert best_is_highest(name) is is_highest


def test_a_metric_of_answers_needs_answers():
    with pytest.raises(ConfigError, match="The metric f1 needs answers: set training.num_eval_answers above 0"):
        Config().replace({"training.best_by": "f1", "training.num_eval_answers": 0})
