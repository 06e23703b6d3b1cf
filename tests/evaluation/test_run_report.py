"""The report of a run: what it says, that it loads nothing, and that it stays small."""

import html
import os
import re
import shutil

import numpy as np
import pytest

from gemma_tune.config import Config
from gemma_tune.data import Turn
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.evaluation_report import evaluation_html
from gemma_tune.evaluation.judge.pairwise import PairVerdict, PairwiseResult
from gemma_tune.evaluation.metrics.choice import find_metrics
from gemma_tune.evaluation.result import EvaluatedModel, Evaluation
from gemma_tune.evaluation.run_charts import thinned_line
from gemma_tune.evaluation.run_report import AnswerHistory, RunReport, write_report

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
CONFIG = Config().replace({"model.source": "gemma3_270m", "lora.rank": 8, "training.best_by": "f1"})
SAMPLE = {
    "question": "Is 1 < 2 <script>alert(1)</script>?",
    "reference": "Yes, one is less than two.",
    "base_answer": "I am a large language model.",
    "tuned_answer": "Yes, one is more than two.",
}


WANTED = ["Hold Power for 12 seconds.", "Open Settings.", "Charge it.", "Is it > 1?"]
BEFORE = ["Hold Power for 12 seconds.", "I don't know <b>that</b>.", "Charge it.", "No."]
AFTER = ["Hold Power for 3 seconds.", "Open Settings.", "Charge it.", "Is it > 1?"]


def evaluation_of(*models, wanted=WANTED, metrics=("f1", "length_words"), columns=("topic",), **others):
    """Returns an evaluation of (name, answers)."""
    cases = [
        EvalCase((Turn("user", f"Question <{row}>?"),), text, {"topic": "power" if row % 2 else "other"}, f"rows:{row}")
        for row, text in enumerate(wanted)
    ]
    found = find_metrics(metrics)
    heldout = {"loss": 2.0, "perplexity": 7.39, "token_accuracy": 0.4}
    return Evaluation("questions.jsonl", cases, found, [
        EvaluatedModel(name, answers, heldout, {each.name: each.statistics(cases, answers) for each in found}, 1.5)
        for name, answers in models
    ], columns, **others)  # fmt: skip


def report(folder, num_steps=40, samples=(SAMPLE,), histories=(), evaluation=None):
    metrics = []
    for step in range(num_steps + 1):
        if step:
            metrics.append({"step": step, "loss": 3 / step, "learning_rate": 1e-3, "step_seconds": 0.5})
        if step % 20 == 0:
            metrics.append({"step": step, "heldout_loss": 3.0 - step / num_steps, "heldout_f1": 0.5 * step / num_steps})
    value = {"value": 0.5, "low": 0.25, "high": 0.75}
    result = {
        "heldout_before": {"loss": 3.0, "perplexity": 20.09, "token_accuracy": 0.1, "f1": 0.0},
        "heldout_after": {"loss": 2.0, "perplexity": 7.39, "token_accuracy": 0.4, "f1": 0.5},
        "heldout_intervals": {"before": {}, "after": {"f1": value}},
        "num_steps": num_steps,
        "best_step": num_steps,
        "best_by": "f1",
        "num_trainable_parameters": 1234,
        "num_answers_right": 3,
        "num_answers_scored": 4,
        "mean_answer_f1": 0.5,
        "samples": list(samples),
        "data": {
            **dict.fromkeys(
                ("num_unreadable", "num_empty", "num_control_tokens", "num_in_heldout", "num_truncated",
                 "num_overlong_dropped", "num_without_target"), 0),
            "num_rows": 100, "num_duplicates": 5, "num_train": 85, "num_heldout": 10,
            "length_tokens": {"min": 5, "mean": 20.0, "median": 18.0, "max": 900},
        },
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    lengths = np.random.default_rng(0).integers(5, 900, 100_000)
    if evaluation is None:
        models = [EvaluatedModel(name, (), result[f"heldout_{name}"], {}) for name in ("before", "after")]
        evaluation = Evaluation("questions.jsonl", (), (), models)
    return write_report(
        folder, RunReport(CONFIG.to_dict(), result, metrics, lengths, evaluation, histories)
    ).read_text()


def test_figures_answers_data_and_settings_are_in_it(tmp_path):
    text = report(tmp_path, histories=[AnswerHistory("Is it?", "Yes, it is.", [(0, "No"), (20, "Yes, it was.")])])
    plain = re.sub(r"<[^>]*>", " ", text)
    for wanted in ("weights of step 40, the best by f1", "3 of 4", "interval 30% to 95%", "1,234 trained parameters"):
        assert wanted in plain
    assert [plain.count(figure) for figure in ("20.09", "7.39")] == [1, 1], "perplexity, before and after"
    assert "<ins> more</ins><del> less</del>" in text, "the word that differs"
    assert "<ins>I am a large language model.</ins>" in text, "another answer is marked as a whole"
    assert "<ins> was</ins><del> is</del>" in text and "step 20" in text, "how answers changed"
    assert text.count("<svg") == 4, "losses, f1, learning rate, lengths"
    assert "lora.rank = 8" in text and "Changed from the defaults (3)" in text
    assert "duplicates" in text and "85" in text and "unreadable" not in text


def test_with_answers_of_all_questions_it_compares_before_and_after(tmp_path):
    """Instead of the samples: figures with a paired test, slices, and what became worse."""
    text = report(tmp_path, evaluation=evaluation_of(("before", BEFORE), ("after", AFTER)))
    assert "Yes, one is" not in text and "f1 by topic" in text and "Worse than before" in text


def test_two_models_are_compared_by_paired_figures_slices_and_answers():
    """What became worse comes first and is open; figures are those of the evaluation, to the digits that are shown."""
    evaluation = evaluation_of(("base model", BEFORE), ("tuned <model>", AFTER))
    text = evaluation_html(evaluation)
    plain = html.unescape(re.sub(r"<[^>]*>", " ", text))
    found = evaluation.comparisons["f1"]
    assert (found.num_wins, found.num_ties, found.num_losses) == (2, 1, 1)
    assert f"{found.difference:.3f}  [{found.interval.low:.3f}, {found.interval.high:.3f}]" in plain
    assert f"{found.p_value:.4f}" in plain and 'title="2 wins">2</span>' in text
    assert "tuned <model>" in plain and "<model>" not in text and "&lt;b&gt;that" in text
    assert 'data-label="tuned &lt;model&gt;"' in text, "labels of a phone"
    summaries = re.findall(r"<details( open)?><summary class=(\w+)>([^<]*)<", text)
    assert summaries == [
        (" open", "worse", "Worse than base model: 1 of 4"),
        ("", "better", "Better than base model: 2 of 4"),
        ("", "same", "As good as base model: 1 of 4"),
    ]
    worse = text[text.index("class=worse>Worse") : text.index("class=better>Better")]
    assert "Question &lt;0&gt;?" in worse and "<ins> 3</ins><del> 12</del>" in worse and "f1 0.800" in worse
    (power, other) = sorted(evaluation.slices["topic"], key=lambda each: each.value == "other")
    assert (power.comparison.num_wins, power.comparison.num_losses, other.comparison.num_losses) == (2, 0, 1)
    assert [
        row.count("class=counts") for row in re.findall(r"<tr>.*?</tr>", text[text.index("f1 by topic") :])[:3]
    ] == [0, 1, 1]
    lengths = re.search(r"length_<wbr>words</abbr></th>(.*?)</tr>", text)[1]
    assert "class=counts" not in lengths and lengths.count("–") == 2, "neither more nor less is better"


def test_what_a_judge_said_and_what_was_left_out_is_in_the_report():
    verdicts = PairwiseResult(
        [PairVerdict("win", ("A", "B"), ("It <is> right.", "")), *[PairVerdict("tie", (), ())] * 3]
    )
    evaluation = evaluation_of(
        ("base", BEFORE), ("tuned", AFTER), judge_name="gemma", judge_verdicts=verdicts, left_out={"bleu": "it needs x"}
    )
    text = html.unescape(evaluation_html(evaluation))
    assert "Judge gemma: tuned has 1 wins, 3 ties, 0 losses against base (p = 1.0000)" in text
    assert "judge: win. It <is> right." in text and "bleu was left out: it needs x" in text


def test_one_model_without_wanted_answers_and_two():
    """One model's answers have no colours; of two, what the second changed is coloured."""
    nothing = [""] * 4
    one = evaluation_html(evaluation_of(("tiny", AFTER), wanted=nothing, metrics=("length_words",), columns=()))
    assert "<ins>" not in one and "<details" not in one and "Open Settings." in one and "wanted answer" not in one
    two = evaluation_html(
        evaluation_of(("tiny", BEFORE), ("other", AFTER), wanted=nothing, metrics=("length_words",), columns=())
    )
    assert "<ins> 3</ins><del> 12</del>" in two and "words that the answer of tiny doesn't have" in two


def test_texts_are_escaped_and_nothing_is_loaded(tmp_path):
    text = report(tmp_path)
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert not re.search(r"""\b(src|href)\s*=(?!["']?#)""", text)
    assert "@import" not in text and "url(http" not in text


def test_it_stays_below_a_megabyte_whatever_the_run_was(tmp_path):
    sample = {**SAMPLE, "tuned_answer": "word " * 2000, "reference": "other " * 2000}
    text = report(tmp_path, num_steps=20_000, samples=[sample] * 1000)
    assert len(text.encode()) < 1_000_000 and "950 more are in samples.json" in text


def test_the_same_run_has_the_same_report(tmp_path):
    assert report(tmp_path / "a") == report(tmp_path / "b")


@pytest.mark.parametrize("count", [1, 5, 299, 300, 301, 5000])
def test_a_thinned_line_keeps_mean_and_range(count):
    values = np.random.default_rng(count).normal(size=count)
    line = thinned_line(range(count), values)
    assert len(line.steps) == min(count, 300)
    sizes = np.array([len(group) for group in np.array_split(values, len(line.steps))])
    assert (line.means * sizes).sum() / count == pytest.approx(values.mean())
    assert line.lows.min() == values.min() and line.highs.max() == values.max()
    assert ((line.lows <= line.means + 1e-12) & (line.means <= line.highs + 1e-12)).all()  # Of rounding.


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_its_theme(tmp_path, theme):
    """Nothing is wider than the screen, charts have a readable font, and their texts have the page's color."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install 'gemma-tune[browser]'")
    if CHROMIUM is None:
        pytest.skip("There is no Chromium: apt-get install chromium, or CHROMIUM=/path/to/it.")
    report(
        tmp_path,
        histories=[AnswerHistory("Is it?", "Yes, it is.", [(0, "No"), (20, "Yes, it was.")])],
        evaluation=evaluation_of(("before", BEFORE), ("after", AFTER)),
    )
    errors, requests = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=theme)
        shown.on("pageerror", lambda error: errors.append(error))
        shown.on("request", lambda request: requests.append(request.url))
        shown.goto(f"file://{tmp_path}/report.html")
        shown.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert shown.evaluate("document.documentElement.scrollWidth") == 390
        heights = shown.evaluate(
            "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)"
        )
        assert len(heights) > 20 and min(heights) > 9, "pixels"
        colors = "[document.body, document.querySelector('svg text')].map(e => getComputedStyle(e)[%r])"
        text, chart = shown.evaluate(colors % "color")[0], shown.evaluate(colors % "fill")[1]
        assert text == chart == ("rgb(0, 0, 0)" if theme == "light" else "rgb(255, 255, 255)")
        browser.close()
    assert not errors and len(requests) == 1
