"""The report of a run: what it says, that it loads nothing, and that it stays small."""

import os
import re
import shutil

import numpy as np
import pytest

from gemma_tune.config import Config
from gemma_tune.evaluation.run_charts import thinned_line
from gemma_tune.evaluation.run_report import AnswerHistory, write_report

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
CONFIG = Config().replace({"model.source": "gemma3_270m", "lora.rank": 8, "training.best_by": "f1"})
SAMPLE = {
    "question": "Is 1 < 2 <script>alert(1)</script>?",
    "reference": "Yes, one is less than two.",
    "base_answer": "I am a large language model.",
    "tuned_answer": "Yes, one is more than two.",
}


def report(folder, num_steps=40, samples=(SAMPLE,), histories=()):
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
    return write_report(folder, CONFIG.to_dict(), result, metrics, lengths, histories).read_text()


def test_figures_answers_data_and_settings_are_in_it(tmp_path):
    text = report(tmp_path, histories=[AnswerHistory("Is it?", "Yes, it is.", [(0, "No"), (20, "Yes, it was.")])])
    plain = re.sub(r"<[^>]*>", " ", text)
    for wanted in ("weights of step 40, the best by f1", "3 of 4", "0.500  [0.250, 0.750]", "1,234 trained parameters"):
        assert wanted in plain
    assert "<ins> more</ins><del> less</del>" in text, "the word that differs"
    assert "<ins>I am a large language model.</ins>" in text, "another answer is marked as a whole"
    assert "<ins> was</ins><del> is</del>" in text and "step 20" in text, "how answers changed"
    assert text.count("<svg") == 4, "losses, f1, learning rate, lengths"
    assert "lora.rank = 8" in text and "Changed from the defaults (3)" in text
    assert "duplicates" in text and "85" in text and "unreadable" not in text


def test_texts_are_escaped_and_nothing_is_loaded(tmp_path):
    text = report(tmp_path)
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert not re.search(r"""(src|href)=["']?(?!#)""", re.sub(r"xmlns(:xlink)?=\"[^\"]*\"", "", text))
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
    report(tmp_path, histories=[AnswerHistory("Is it?", "Yes, it is.", [(0, "No"), (20, "Yes, it was.")])])
    errors, requests = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=theme)
        shown.on("pageerror", errors.append)
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
