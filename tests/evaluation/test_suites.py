"""Suites: what is read, what passes and what fails, and what CI is told."""

import re
from collections import Counter

import junitparser
import numpy as np
import pytest

from gemma_tune.data import Turn
from gemma_tune.errors import ConfigError, DataError
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.metric import Metric, mean_statistics
from gemma_tune.evaluation.suites.check_suite import Check, FailedRow, PartAnswers, check_suite, part_statistics
from gemma_tune.evaluation.suites.junit import write_junit
from gemma_tune.evaluation.suites.load_suite import load_suite
from gemma_tune.evaluation.suites.suite import Suite, SuitePart, parse_requirement


def _scores_of(score):
    return lambda cases, answers: mean_statistics(
        [score(case, answer) for case, answer in zip(cases, answers, strict=True)]
    )


def _nearest(cases, answers):
    """1 where an answer is its own reference, and no other case has that reference."""
    all_references = Counter(case.reference for case in cases)
    return mean_statistics([a == c.reference and all_references[a] == 1 for c, a in zip(cases, answers, strict=True)])


EQUAL = Metric("equal", "Share of equal answers.", _scores_of(lambda case, answer: answer == case.reference))
LENGTH = Metric("length", "Number of letters.", _scores_of(lambda case, answer: len(answer)), is_higher_better=None)
SLIPS = Metric("slips", "Number of x.", _scores_of(lambda case, answer: answer.count("x")), is_higher_better=False)
NEVER = Metric("never", "Counts no row.", _scores_of(lambda case, answer: None))
CODE = Metric("code", "For code.", EQUAL.statistics, problem=lambda cases: "no row has code.")
NEAREST = Metric("nearest", "Share of answers that are only their own reference.", _nearest)
METRICS = {metric.name: metric for metric in (EQUAL, LENGTH, SLIPS, NEVER, CODE, NEAREST)}
ROWS = '{"question": "a?", "answer": "A"}\n{"question": "b?", "answer": "B"}\n'


def cases(*references):
    return tuple(
        EvalCase((Turn("user", f"question {i}"),), reference, {}, f"q.jsonl:{i}")
        for i, reference in enumerate(references)
    )


def checks_of(answers, must=(), references="ABCD", other=None, seconds=None, **wanted):
    """The checks of a suite of one part, with one letter an answer."""
    bounds = tuple(parse_requirement(text, "here") for text in must)
    names = tuple(dict.fromkeys([*(bound.metric for bound in bounds), *wanted.get("must_not_regress", ())]))
    suite = Suite("s", "", (SuitePart("p", cases(*references), names, bounds, **wanted),))
    return check_suite(suite, {"p": PartAnswers(answers, other, seconds)}, METRICS)


def failed(check):
    return [row.case.origin for row in check.failed_rows]


@pytest.mark.parametrize(
    "text, holding, failing",
    [
        ("f1 >= 0.8", (0.8, 0.9), (0.79,)),
        ("f1>0.8", (0.81,), (0.8, 0.1)),
        ("length_words <= 1e2", (100, 3), (101,)),
        ("x < -1", (-2,), (-1, 0)),
        ("refusal == 0", (0,), (0.1,)),
        ("right_answer >= 36/40", (36 / 40, 1), (35 / 40,)),
        ("right_answer >= 2 / 3", (1 - 1 / 3, 0.1 + 0.2 + 1.1 / 3), (0.66,)),
    ],
)
def test_expressions(text, holding, failing):
    requirement = parse_requirement(text, "here")
    assert all(requirement.holds(figure) for figure in holding)
    assert not any(requirement.holds(figure) for figure in (*failing, float("nan")))


@pytest.mark.parametrize(
    "text", ["f1", "f1 => 0.8", "f1 >= high", "0.8 <= f1", "f1.mid >= 1", "f1 >= 1/0", "f1 >= 1 2", ""]
)
def test_expressions_that_are_not_understood(text):
    with pytest.raises(
        ConfigError, match=r"suite.yaml: part 1: '.*' can't be understood.*METRIC SIGN NUMBER.*f1.low.*>=, >, <=, <, =="
    ):
        parse_requirement(text, "suite.yaml: part 1")


def test_a_bound_holds_or_its_rows_are_named_the_worst_first():
    (check,) = checks_of(["A", "B", "C", "D"], ["equal >= 1"])
    assert (check.passed, check.observed, check.failed_rows, check.part, check.wanted) == (
        True,
        1,
        (),
        "p",
        "equal >= 1",
    )
    (check,) = checks_of(["A", "?", "C", "?"], ["equal >= 3/4"])
    assert (check.passed, check.observed, failed(check)) == (False, 0.5, ["q.jsonl:1", "q.jsonl:3"])
    assert re.search(r"equal is 0.5 \(95% interval 0\.15 to 0\.85, 4 answers\); equal >= 3/4 is wanted", check.message)
    (check,) = checks_of(["x", "xxxx", "", "xx"], ["slips < 1"])
    assert (check.passed, failed(check)) == (False, ["q.jsonl:1", "q.jsonl:3", "q.jsonl:0"])
    assert check.failed_rows[0].reason == "slips 4"


def test_the_ends_of_the_interval():
    """Wilson's interval of 4 right answers of 4 begins at n / (n + z²): 4 / (4 + 1.96²) = 0.51."""
    low, high = checks_of(list("ABCD"), ["equal.low >= 0.52", "equal.high <= 1"])
    assert low.passed is False and low.observed == pytest.approx(4 / (4 + 1.959964**2), abs=1e-6)
    assert high.passed is True
    assert checks_of(list("ABCD"), ["equal.low >= 0.51"])[0].passed is True


def test_a_metric_that_can_judge_no_row_fails():
    (check,) = checks_of(list("ABCD"), ["never >= 0"])
    assert check.passed is False and "none of the 4 answers" in check.message


def test_worse_than_another_model_by_the_paired_test():
    references = "A" * 12
    wanted = {"references": references, "must_not_regress": ("equal",)}
    (much_worse,) = checks_of(["?"] * 8 + ["A"] * 4, other=list(references), **wanted)
    assert much_worse.passed is False and much_worse.observed == pytest.approx(-8 / 12)
    assert failed(much_worse) == [f"q.jsonl:{i}" for i in range(8)]
    assert "worse on 8" in much_worse.message
    (by_chance,) = checks_of(["?"] * 2 + ["A"] * 10, other=list(references), **wanted)
    assert by_chance.passed is True  # p = 0.5.
    (better,) = checks_of(list(references), other=["?"] * 12, **wanted)
    assert better.passed is True and better.observed == 1
    (unknown,) = checks_of(list(references), **wanted)
    assert unknown.passed is None and "no answers of another model" in unknown.message


def test_less_is_better_for_some_metrics():
    wanted = {"references": "A" * 12, "must_not_regress": ("slips",)}
    assert checks_of(["xx"] * 12, other=["x"] * 12, **wanted)[0].passed is False
    assert checks_of(["x"] * 12, other=["xx"] * 12, **wanted)[0].passed is True


def test_forbidden_texts():
    answers = ["See HTTP://a", "no", "http://b", "x"]
    none, some = checks_of(answers, must_not_contain={"http://": 0, "no": 1})
    assert (none.passed, none.observed, failed(none)) == (False, 2, ["q.jsonl:0", "q.jsonl:2"])
    assert (some.passed, some.observed, failed(some)) == (True, 1, ["q.jsonl:1"])
    assert none.wanted != some.wanted and "at most 1 answer" in some.wanted


def test_latency():
    seconds = [1.0] * 97 + [9.0, 7.0, 8.0]
    wanted = {"references": "A" * 100, "answers": ["A"] * 100}
    (check,) = checks_of(max_latency_seconds=2.0, seconds=seconds, **wanted)
    assert check.passed is True and check.observed == 1.0
    assert failed(check) == ["q.jsonl:97", "q.jsonl:99", "q.jsonl:98"]
    assert checks_of(max_latency_seconds=0.5, seconds=seconds, **wanted)[0].passed is False
    assert checks_of(max_latency_seconds=0.5, **wanted)[0].passed is None


def test_a_metric_sees_the_questions_of_all_parts_that_need_it():
    parts = (
        SuitePart("one", cases("A", "B"), ("nearest", "equal")),
        SuitePart("two", cases("A"), ("nearest",)),
        SuitePart("three", cases("B"), ("equal",)),
    )
    found = part_statistics(Suite("s", "", parts), {"one": ["A", "B"], "two": ["A"], "three": ["?"]}, METRICS)
    assert found["one"]["nearest"][:, 0].tolist() == [0, 1]  # `A` is the reference of a question of part two as well.
    assert found["two"]["nearest"][:, 0].tolist() == [0]
    assert {
        name: statistics["equal"][:, 0].tolist() for name, statistics in found.items() if "equal" in statistics
    } == {
        "one": [1, 1],
        "three": [0],
    }


@pytest.fixture
def suite_of(write, tmp_path):
    """Writes a suite of the YAML text, and loads it."""

    def load(yaml, rows=ROWS):
        write("mine/q.jsonl", rows)
        write("mine/suite.yaml", yaml)
        return load_suite(tmp_path / "mine", METRICS)

    return load


def test_a_suite_is_read(suite_of, tmp_path):
    suite = suite_of(
        "name: my suite\ndescription: Says it.\ngeneration: {max_new_tokens: 9}\nparts:\n- name: one\n  data: q.jsonl\n  metrics: [length]\n"
        "  must: ['equal >= 0.5', 'equal.low >= 0.1', length < 9]\n  must_not_regress: slips\n  must_not_contain: [bad, worse]\n"
        "  max_latency_seconds: 5\n- {name: two, data: q.jsonl, must_not_contain: {bad: 1}}\n"
    )
    one, two = suite.parts
    assert (suite.name, suite.description, suite.generation) == ("my suite", "Says it.", {"max_new_tokens": 9})
    assert one.metrics == ("length", "equal", "slips")
    assert [(bound.metric, bound.end, bound.sign, bound.bound) for bound in one.must] == [
        ("equal", "", ">=", 0.5), ("equal", "low", ">=", 0.1), ("length", "", "<", 9),
    ]  # fmt: skip
    assert (one.must_not_regress, one.must_not_contain, one.max_latency_seconds) == (
        ("slips",),
        {"bad": 0, "worse": 0},
        5,
    )
    assert (two.metrics, two.must_not_contain, two.max_latency_seconds) == ((), {"bad": 1}, None)
    assert [(case.question, case.reference, case.origin) for case in one.cases] == [
        ("a?", "A", f"{tmp_path}/mine/q.jsonl:1"), ("b?", "B", f"{tmp_path}/mine/q.jsonl:2"),
    ]  # fmt: skip
    assert len(suite.cases) == 4 and suite.needs_other_model
    assert load_suite(tmp_path / "mine" / "suite.yaml", METRICS) == suite


def test_rows_without_a_wanted_answer(suite_of):
    suite = suite_of("parts: [{name: one, data: q.jsonl}]", '{"question": "a?", "must_contain": ["x"]}\n')
    (case,) = suite.cases
    assert (case.question, case.reference, case.columns["must_contain"]) == ("a?", "", ["x"])
    assert (suite.name, suite.needs_other_model) == ("mine", False)


PART = "parts: [{name: one, data: q.jsonl, "


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("parts: [", r"suite.yaml is not valid YAML: .*line 1"),
        ("- a", r"suite.yaml should be a mapping with the keys name, description, parts, generation, found \['a'\]"),
        ("{}", "'parts' is empty"),
        ("parts: 7", "'parts' should be a list of mappings, found 7"),
        ("part: []", "unknown key 'part'. Did you mean parts"),
        ("parts: [{name: one}]", r"part 1: 'data' is missing. Keys found: name"),
        ("parts: [{data: q.jsonl}]", "part 1: 'name' is missing"),
        ("parts: [{name: [1], data: q.jsonl}]", r"'name' should be a text, found \[1\]"),
        ("name: 7\nparts: [{name: one, data: q.jsonl}]", "'name' should be a text, found 7"),
        ("parts: [{name: one, data: q.jsonl}, {name: one, data: q.jsonl}]", "several parts are called one"),
        (PART + "musst: f1 >= 1}]", r"part 1: unknown key 'musst'. Did you mean must"),
        (PART + "must: equal}]", r"part 1 \(one\): 'must': 'equal' can't be understood"),
        (PART + "must: equale >= 1}]", r"part 1 \(one\): there is no metric 'equale'. Did you mean equal\? Known: code, equal"),
        (PART + "must: [[1]]}]", r"'must' should be a list of texts, found \[1\]"),
        (PART + "must_not_regress: length}]", "length, of which neither more nor less is better"),
        (PART + "must_not_contain: [7]}]", "'must_not_contain' should be a list of texts, found 7"),
        (PART + "must_not_contain: {a: many}}]", "should say how many answers may contain a text, found 'a': 'many'"),
        (PART + "max_latency_seconds: 0}]", "must be a number above 0, got 0"),
        (PART + "max_latency_seconds: .nan}]", "must be a number above 0, got nan"),
        ("generation: {max_tokens: 3}\n" + PART + "}]", "'generation': unknown key 'max_tokens'.*max_new_tokens"),
        ("generation: 3\n" + PART + "}]", "'generation' should be a mapping of settings, found 3"),
        ("name: !!python/object/apply:os.getcwd []\n" + PART + "}]", "is not valid YAML.*could not determine a constructor"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_suite(suite_of, yaml, message):
    with pytest.raises(ConfigError, match=message):
        suite_of(yaml)


def test_what_is_wrong_with_its_data(suite_of, tmp_path):
    with pytest.raises(DataError, match=r"part 1 \(one\): There is no file .*mine/qq.jsonl. Did you mean q.jsonl"):
        suite_of("parts: [{name: one, data: qq.jsonl}]")
    with pytest.raises(DataError, match=r"part 1 \(one\): .*q.jsonl:1: not valid JSON"):
        suite_of("parts: [{name: one, data: q.jsonl}]", "{")
    with pytest.raises(DataError, match="the metric code doesn't suit the questions of one: no row has code"):
        suite_of(PART + "metrics: code}]")


def test_a_suite_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"no suite 'smartphone_suport'.*Did you mean smartphone_support\?"):
        load_suite("smartphone_suport", METRICS)
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match="has no suite.yaml. Files found: a.jsonl"):
        load_suite(tmp_path, METRICS)


CHECKS = [
    Check("one", "f1 >= 0.8", True, 0.9, "fine"),
    Check("one", "f1 <= \"1\" & 'a' < 2", False, 0.4, "too low: <b>\x00\ud800", (
        FailedRow(EvalCase((Turn("user", "q\x08?"),), "wanted ]]>", {}, "a.jsonl:1"), "\x1b[31mred\ufffe 😀 \t\n", "f1 0.1"),
    )),
    Check("two", "faster", None, float("nan"), "not measured"),
]  # fmt: skip


def test_junit_as_another_reader_understands_it(tmp_path):
    path = tmp_path / "deep" / "junit.xml"
    write_junit(path, "suite\x07", CHECKS)
    report = junitparser.JUnitXml.fromfile(str(path))
    assert (report.name, report.tests, report.failures, report.errors, report.skipped) == ("suite\\x07", 3, 1, 0, 1)
    suites = list(report)
    assert [(suite.name, suite.tests, suite.failures, suite.skipped) for suite in suites] == [
        ("one", 2, 1, 0),
        ("two", 1, 0, 1),
    ]
    good, bad, unknown = [case for suite in suites for case in suite]
    assert (good.classname, good.name, good.is_passed) == ("suite\\x07.one", "f1 >= 0.8", True)
    assert (bad.name, bad.is_failure) == ("f1 <= \"1\" & 'a' < 2", True)
    (failure,) = bad.result
    assert isinstance(failure, junitparser.Failure) and failure.message == "too low: <b>\\x00\\ud800"
    assert "a.jsonl:1: f1 0.1\nquestion: q\\x08?\nanswer:   \\x1b[31mred\\ufffe 😀 \t\n" in failure.text
    assert "wanted:   wanted ]]>" in failure.text
    assert unknown.is_skipped and unknown.result[0].message == "not measured"
    report.update_statistics()  # Counts anew: the counts that were written are right.
    assert (report.tests, report.failures, report.errors, report.skipped) == (3, 1, 0, 1)


def test_junit_keeps_a_long_list_short(tmp_path):
    row = FailedRow(cases("A")[0], "?", "equal 0")
    write_junit(tmp_path / "junit.xml", "s", [Check("p", "w", False, 0, "m", (row,) * 500)])
    text = (tmp_path / "junit.xml").read_text()
    assert text.count("equal 0") == 20 and "and 480 more" in text


def test_junit_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="junit.xml can't be written"):
        write_junit(tmp_path / "file" / "junit.xml", "s", CHECKS)


def test_latencies_are_numbers_of_any_kind():
    (check,) = checks_of(["A"] * 4, max_latency_seconds=2, seconds=np.array([1, 1, 1, 3], np.float32))
    assert check.passed is False
