"""`gemma-tune eval`: figures with intervals, slices, two models, the report, suites, and what is refused."""

import json
import xml.etree.ElementTree as ET

import pytest

QUICK = ("--num_questions=6", "--max_new_tokens=6")
HELDOUT = "--data=sample:smartphone_support/heldout"


@pytest.fixture
def evaluated(call, tmp_path):
    """`evaluated(argument, …)` runs `eval` on few questions and returns its JSON object."""

    def run(*arguments):
        code, out, err = call("eval", *QUICK, f"--output={tmp_path / 'out'}", "--json", *arguments)
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.mark.slow
def test_a_run_is_scored_beside_its_base(trained, evaluated, tmp_path):
    result = evaluated(f"--model={trained}", "--by=topic")
    saved = json.loads((trained / "result.json").read_text())
    assert result["tuned"]["loss"] == pytest.approx(saved["heldout_after"]["loss"], rel=1e-4)
    assert result["base"]["loss"] == pytest.approx(saved["heldout_before"]["loss"], rel=1e-4)
    assert [model["name"] for model in result["models"]] == ["base model", "tuned model"]
    figure = result["models"][1]["metrics"]["f1"]
    assert figure["low"] <= figure["value"] <= figure["high"] and figure["num_rows"] == 6
    assert result["comparison"]["f1"]["num_wins"] + result["comparison"]["f1"]["num_ties"] <= 6
    assert len(result["slices"]) == 6  # A topic has one held-out question.
    values = [each["figures"][-1]["value"] for each in result["slices"]]
    assert values == sorted(values)
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(set(row["answers"]) == {"base model", "tuned model"} for row in rows)
    assert rows[0]["columns"]["topic"] and rows[0]["reference"]
    report = (tmp_path / "out" / "evaluation.html").read_text()
    assert "http" not in report.replace("http://www.w3.org", "") and "f1 by topic" in report
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"] == result["models"]


@pytest.mark.slow
def test_an_adapter_a_base_alone_and_another_model(trained, evaluated):
    run = evaluated(f"--model={trained}")
    with_adapter = evaluated("--model=tiny", f"--adapter={trained}/adapter", HELDOUT)
    assert with_adapter["tuned"]["loss"] == pytest.approx(run["tuned"]["loss"], rel=1e-5)
    assert with_adapter["models"][1]["metrics"] == run["models"][1]["metrics"]
    alone = evaluated("--model=tiny", HELDOUT)
    assert [model["name"] for model in alone["models"]] == ["tiny"] and not alone["comparison"] and not alone["tuned"]
    assert alone["base"]["loss"] == pytest.approx(run["base"]["loss"], rel=1e-4)
    against_itself = evaluated(f"--model={trained}", f"--against={trained}")
    found = against_itself["comparison"]["f1"]
    assert (found["difference"], found["num_ties"], found["p_value"]) == (0, 6, 1)
    assert len(evaluated(f"--model={trained}", "--against=none")["models"]) == 1


@pytest.mark.slow
def test_tables_for_people(call, trained, tmp_path, write):
    own = write("own.py", "def shout(answer):\n    '''Whether it is loud.'''\n    return answer.isupper()\n")
    code, out, _ = call(
        "eval", f"--model={trained}", *QUICK, f"--output={tmp_path / 'o'}", f"--metric={own}:shout",
        "--metrics=f1,chrf", "--by=topic",
    )  # fmt: skip
    assert code == 0
    for words in ("6 questions of", "base model", "win/tie/loss", "shout", "chrf", "shout by topic", "The worst"):
        assert words in out, words
    assert f"Saved in {tmp_path / 'o'}" in " ".join(out.split())


@pytest.mark.slow
def test_questions_without_wanted_answers_and_documents(evaluated, write):
    asked = write("asked.jsonl", '{"question": "What is it?", "regex": "."}\n{"question": "And now?"}\n')
    result = evaluated("--model=tiny", f"--data={asked}")
    metrics = result["models"][0]["metrics"]
    assert set(metrics) == {"regex", "refusal", "length_words"} and metrics["regex"]["num_rows"] == 1
    assert "loss" not in result["models"][0]
    documents = write("documents.jsonl", '{"text": "A document that is only read, never answered."}\n' * 2)
    result = evaluated("--model=tiny", f"--data={documents}")
    assert result["num_examples"] == 0 and result["base"]["loss"] > 0


@pytest.mark.slow
def test_questions_with_choices_are_scored_by_likelihood(evaluated, write):
    rows = [
        {"question": f"Which one, {i}?", "choices": ["this", "that one", "neither"], "answer": i % 3} for i in range(6)
    ]
    data = write("choices.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    (model,) = evaluated("--model=tiny", f"--data={data}")["models"]
    assert set(model["metrics"]) == {"choice_accuracy", "choice_accuracy_per_byte"} and "loss" not in model
    assert model["metrics"]["choice_accuracy"]["num_rows"] == 6
    (model,) = evaluated("--model=tiny", f"--data={data}", "--metrics=length_words")["models"]
    assert set(model["metrics"]) == {"choice_accuracy", "choice_accuracy_per_byte", "length_words"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--by=topik",), 2, "no column 'topik'. Columns: instruction, response, topic. Did you mean topic?"),
        (("--metrics=blue",), 2, "no metric 'blue'. Did you mean bleu?"),
        (("--metrics=json_match",), 2, "json_match doesn't suit this data: no wanted answer is JSON"),
        (("--metric=nowhere.py:f",), 2, "there is no file nowhere.py"),
        (("--junit=j.xml",), 2, "name one with --suite"),
        (("--suite=nowhere",), 2, "There is no suite 'nowhere'"),
        (("--suite=smartphone_support", "--metrics=f1"), 2, "--metrics has no effect with --suite"),
        (("--against=nowhere",), 1, "nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(call, arguments, code, message):
    data = () if "--suite" in arguments[0] else (HELDOUT,)
    found, _, err = call("eval", "--model=tiny", *data, *arguments)
    assert found == code and message in err


def test_a_wrong_pattern_is_said_before_a_model_is_loaded(call, write, monkeypatch):
    monkeypatch.setattr("gemma_tune.pipeline.evaluation.load_models", None)  # Calling it would be a TypeError.
    asked = write("asked.jsonl", '{"question": "What is it?", "regex": "."}\n{"question": "And now?", "regex": "("}\n')
    code, _, err = call("eval", "--model=tiny", f"--data={asked}")
    assert code == 1 and "asked.jsonl:2: 'regex' should be a regular expression, found '('" in err


SUITE = """
name: small
generation: {max_new_tokens: 4}
parts:
  - name: easy
    data: easy.jsonl
    must: ["length_words <= 4", "length_words >= 0"]
    max_latency_seconds: 60
  - name: hard
    data: hard.jsonl
    must: ["exact_match >= 0.5"]
    must_not_regress: [f1]
"""


@pytest.mark.slow
def test_a_suite_fails_with_1_and_says_why(call, trained, write, tmp_path):
    write("suite/suite.yaml", SUITE)
    write("suite/easy.jsonl", '{"question": "What?"}\n{"question": "Why?"}\n')
    write("suite/hard.jsonl", '{"question": "What is new?", "answer": "Nothing at all is new"}\n')
    junit = tmp_path / "out" / "junit.xml"
    code, out, err = call("eval", f"--model={trained}", f"--suite={tmp_path / 'suite'}", f"--junit={junit}", "--json")
    result = json.loads(out)
    assert (code, result["passed"]) == (1, False)
    assert "1 of 5 checks of the suite small have failed: hard: exact_match >= 0.5" in err
    assert [check["passed"] for check in result["checks"]] == [True, True, True, False, True]
    assert len(ET.parse(junit).getroot().findall(".//failure")) == 1
    code, out, _ = call("eval", f"--model={trained}", f"--suite={tmp_path / 'suite'}")
    assert code == 1 and "What is new?" in out and "small: 3 questions in 2 parts" in out
    write("suite/suite.yaml", SUITE.replace("exact_match >= 0.5", "exact_match >= 0"))
    code, out, _ = call("eval", f"--model={trained}", f"--suite={tmp_path / 'suite'}")
    assert code == 0 and "failed" not in out
