"""Metrics of answers during training, on a tiny model."""

import json
import logging
import os
import shutil
import signal

import jax
import pytest

from gemma_tune import Config, pipeline
from gemma_tune.data import Turn
from gemma_tune.errors import ConfigError
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.choice import METRICS
from gemma_tune.pipeline import training_run
from gemma_tune.pipeline.heldout_metrics import (
    HeldoutQuestions,
    answer_histories,
    best_is_highest,
    evaluation_of_run,
    heldout_questions,
    intervals_of,
    read_step_answers,
    slice_columns_of,
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
    report = (tmp_path / "w" / "report.html").read_text()
    assert "than before" in report and "better, as good, worse" in report and report.count("step 2</th>") == 1


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


def cases_with(**columns):
    (count,) = {len(values) for values in columns.values()}
    return [
        EvalCase((Turn("user", f"q{row}"),), f"answer {row}", {name: values[row] for name, values in columns.items()})
        for row in range(count)
    ]


def test_a_report_is_divided_by_columns_of_few_values():
    cases = cases_with(
        topic=list("abcabcabc"), kind=[1, 1, 1, 1, 1, 1, None, None, None], same=["x"] * 9, id=list("123456789"),
        pairs=list("aabbccdde"), tags=[["a"], ["b"]] * 4 + [["a"]],
    )  # fmt: skip
    assert slice_columns_of(cases) == ["topic", "kind"]
    assert slice_columns_of([]) == []


def test_before_and_after_are_compared_if_all_answers_are_there():
    cases = cases_with(topic=list("aabb"))
    questions = HeldoutQuestions(cases, [METRICS["f1"]])
    figures, right = ({"loss": 2.0}, {"loss": 1.0}), [case.reference for case in cases]
    found = evaluation_of_run("data", questions, figures, (["no"] * 4, right))
    assert found.comparisons["f1"].num_wins == 4 and [model.heldout["loss"] for model in found.models] == [2.0, 1.0]
    assert intervals_of(found)["after"]["f1"]["value"] == 1.0
    for asked, answers in ((questions, ([], right)), (questions, (right, right[:3])), (None, ([], []))):
        found = evaluation_of_run("data", asked, figures, answers)
        assert not found.cases and not found.metrics and intervals_of(found) == {"before": {}, "after": {}}
        assert [model.heldout["loss"] for model in found.models] == [2.0, 1.0]


def test_histories_are_of_ten_steps_at_most_and_leave_out_what_cannot_be_read(tmp_path):
    for step in range(0, 250, 10):
        rows = [{"question": f"q{n}", "reference": "r", "answer": f"{step}\u2028{n}"} for n in range(3)]
        write_step_answers(tmp_path, step, rows)
    histories = answer_histories(tmp_path, 2)
    assert [(each.question, len(each.answers)) for each in histories] == [("q0", 10), ("q1", 10)]
    steps = [step for step, _ in histories[1].answers]
    assert steps[0] == 0 and steps[-1] == 240 and steps == sorted(set(steps))
    assert histories[1].answers[-1] == (240, "240\u20281"), "a separator of lines that isn't one of JSON Lines"
    (tmp_path / "answers" / f"step_{steps[4]:06d}.jsonl").write_text('{"question": 1')
    assert [step for step, _ in answer_histories(tmp_path, 2)[0].answers] == [*steps[:4], *steps[5:]]
    assert answer_histories(tmp_path / "nowhere", 2) == []
