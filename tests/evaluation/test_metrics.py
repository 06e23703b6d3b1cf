"""Metrics of answers: against sacrebleu, rouge-score, SciPy-like counts by hand, and by what they must not count."""

import json
import random

import numpy as np
import pytest

from gemma_tune.data import Turn
from gemma_tune.errors import ConfigError, DataError
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.choice import METRICS, choose_metrics
from gemma_tune.evaluation.metrics.numbers import last_number
from gemma_tune.evaluation.metrics.patterns import is_refusal
from gemma_tune.evaluation.metrics.tool_calls import parse_tool_calls
from gemma_tune.evaluation.resampling import figure_of, row_figures

TEXT = 'the a phone battery of Settings > open it, reset. don\'t 12 3.5 über größe नमस्ते 电池 ok! "quote" -dash-'
WORDS = TEXT.split()


def case(reference="", **columns):
    return EvalCase((Turn("user", "question"),), reference, columns, "rows.jsonl:1")


def random_pairs(count, seed=0):
    """Returns answers that share beginnings with their references; some are empty."""
    rng = random.Random(seed)

    def text(lengths):
        return " ".join(rng.choice(WORDS) for _ in range(rng.choice(lengths)))

    references = [text((1, 2, 3, 5, 8, 13, 21)) for _ in range(count)]
    answers = []
    for reference in references:
        kept = reference.split()[: rng.randint(0, len(reference.split()))]
        answers.append(" ".join([*kept, text((0, 1, 3))]).strip())
    return answers, references


def rows_of(name, answers, cases):
    return METRICS[name].statistics(cases, answers)


def score(name, answer, reference="", **columns):
    return float(row_figures(METRICS[name], rows_of(name, [answer], [case(reference, **columns)]))[0])


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_metrics_are_sacrebleus(name):
    """The figure of summed statistics is sacrebleu's corpus score, and that of a row its sentence score."""
    sacrebleu = pytest.importorskip("sacrebleu")
    scorer = sacrebleu.BLEU(effective_order=True) if name == "bleu" else sacrebleu.CHRF()
    answers, references = random_pairs(200)
    statistics = rows_of(name, answers, [case(reference) for reference in references])
    assert figure_of(METRICS[name], statistics) == pytest.approx(
        scorer.corpus_score(answers, [references]).score, abs=1e-9
    )
    wanted = [
        scorer.sentence_score(answer, [reference]).score for answer, reference in zip(answers, references, strict=True)
    ]
    np.testing.assert_allclose(row_figures(METRICS[name], statistics), wanted, atol=1e-9)
    many = np.stack([statistics[:50].sum(0), statistics[50:].sum(0)])
    halves = [scorer.corpus_score(answers[s], [references[s]]).score for s in (slice(50), slice(50, None))]
    np.testing.assert_allclose(METRICS[name].figure(many), halves, atol=1e-9)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_of_rouge_score(name):
    """On ASCII, which is all that the package's own tokenizer keeps; other alphabets count here."""
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer([name])
    answers, references = ([text.encode("ascii", "ignore").decode() for text in texts] for texts in random_pairs(100))
    for answer, reference in zip(answers, references, strict=True):
        if reference:
            assert score(name, answer, reference) == pytest.approx(
                scorer.score(reference, answer)[name].fmeasure, abs=1e-6
            )
    assert score("rouge1", "नमस्ते 电池", "नमस्ते 电池") == 1


@pytest.mark.peers  # scikit-learn comes with lm-eval.
def test_f1_is_the_f1_of_indicators():
    """Against scikit-learn's on the words of both texts, each word once per occurrence."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = random.Random(1)
    for _ in range(50):
        first, second = ([rng.choice("abcdef") for _ in range(rng.randint(1, 8))] for _ in range(2))
        words = sorted({(word, n) for text in (first, second) for word in text for n in range(text.count(word))})
        indicators = [[text.count(word) > n for word, n in words] for text in (first, second)]
        wanted = metrics.f1_score(indicators[1], indicators[0], zero_division=0.0)
        assert score("f1", " ".join(first), " ".join(second)) == pytest.approx(wanted, abs=1e-9)


def test_exact_match_counts_words_alone():
    assert score("exact_match", " The Battery! ", "the battery") == 1
    assert score("exact_match", "the batteries", "the battery") == 0
    assert np.isnan(score("exact_match", "anything", ""))


def test_a_right_answer_is_nearer_to_its_own_reference():
    cases = [case("turn the phone off and on"), case("turn the sound off")]
    rows = rows_of("right_answer", ["turn the phone off", "turn the phone off and on"], cases)
    assert row_figures(METRICS["right_answer"], rows).tolist() == [1, 0]
    assert "the same" in METRICS["right_answer"].problem([case("one"), case("one")])


@pytest.mark.parametrize(
    "text, number",
    [
        ("It costs $1,234.50.", 1234.5),
        ("1.234,5 €", 1234.5),
        ("1 234", 1234),
        ("12'345.5", 12345.5),
        ("10,000,000 users", 10e6),
        ("0,125", 0.125),
        ("1.234", 1.234),
        ("1,5 cm", 1.5),
        ("first 3, then -7", -7),
        ("3/4 of it", 0.75),
        ("50 %", 50),
        ("from 3-5 days", 5),
        ("x2 and nothing", None),
        ("no number", None),
        ("1/0", None),
        ("In 2024 100 people came", 100),
        ("५", 5),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (number if number is None else pytest.approx(number))


def test_numbers_match_by_value():
    assert score("number_match", "So 1,500 in all.", "1500") == 1
    assert score("number_match", "1500 or 1600", "1500") == 0
    assert score("number_match", "none", "1500") == 0
    assert np.isnan(score("number_match", "1500", "none"))


def test_json_is_read_as_json():
    assert score("json_valid", '```json\n{"a": [1, 2.5, null]}\n```') == 1
    assert [score("json_valid", text) for text in ("{'a': 1}", '{"a": NaN}', "Sure: {}", "")] == [0, 0, 0, 0]
    assert score("json_match", '{"b": [1], "a": 2.0}', '{"a": 2, "b": [1]}') == 1
    assert score("json_match", '{"a": true}', '{"a": 1}') == 0
    assert score("json_match", "[1, 2]", "[2, 1]") == 0


def test_a_schema_is_followed_or_not():
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    for column in (schema, json.dumps(schema)):
        assert score("json_schema", '{"n": 3}', json_schema=column) == 1
        assert score("json_schema", '{"n": "3"}', schema=column) == 0
        assert score("json_schema", "n is 3", json_schema=column) == 0
    for wrong in ("no json", {"type": "objekt"}):
        with pytest.raises(DataError, match="rows.jsonl:1"):
            score("json_schema", "{}", json_schema=wrong)


CALL = {"location": "London, {UK}", "days": 3, "exact": True, "tags": ["a", "b"]}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"name": "weather", "arguments": CALL}),
        json.dumps([{"name": "weather", "parameters": CALL}]),
        json.dumps({"tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": json.dumps(CALL)}}]}),
        f"<tool_call>\n{json.dumps({'name': 'weather', 'arguments': CALL})}\n</tool_call>",
        f"Let me see.\n```json\n{json.dumps({'name': 'weather', 'arguments': CALL})}\n```",
        '```tool_code\nweather(location="London, {UK}", days=3, exact=True, tags=["a", "b"])\n```',
        "<start_function_call>call:weather{location:<escape>London, {UK}<escape>,days:3,exact:true,"
        "tags:[<escape>a<escape>,<escape>b<escape>]}<end_function_call>",
    ],
)
def test_tool_calls_are_read_in_all_their_forms(text):
    assert parse_tool_calls(text) == [("weather", CALL)]
    wanted = json.dumps({"name": "weather", "arguments": dict(reversed(CALL.items()), days=3.0)})
    other = json.dumps({"name": "weather", "arguments": CALL | {"days": 4}})
    assert [score(name, text, wanted) for name in ("tool_name", "tool_arguments")] == [1, 1]
    assert [score(name, text, other) for name in ("tool_name", "tool_arguments")] == [1, 0]
    assert score("tool_name", "It is sunny.", wanted) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "call:f{",
        "<start_function_call>call:f{a:<end_function_call>",
        "<start_function_call>call:f{a:[b}<end_function_call>",
        "```tool_code\nf(a=os.x)\n```",
        "[[[" * 9,
    ],
)
def test_what_is_no_call_is_none(text):
    assert parse_tool_calls(text) == []


def test_patterns_and_texts_of_columns():
    assert score("regex", "Order 123-4567", regex=r"\d{3}-\d{4}") == 1
    assert score("contains", "Paris  is the CAPITAL", must_contain=["paris is", "capital"]) == 1
    assert score("contains", "Paris", must_contain=["paris", "france"]) == 0
    assert score("forbidden", "I will not say it", must_not_contain="password") == 1
    assert score("forbidden", "The Password is", must_not_contain=["x", "password"]) == 0
    assert score("length_words", "one two, three") == 3
    with pytest.raises(DataError, match="rows.jsonl:1.*regular expression"):
        score("regex", "x", regex="(")
    with pytest.raises(DataError, match="must_contain"):
        score("contains", "x", must_contain=3)


@pytest.mark.parametrize(
    "text, refuses",
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI, I have no opinion.", True),
        ("Das tut mir leid, leider kann ich das nicht beantworten.", True),
        ("Lo siento, no puedo ayudar con eso.", True),
        ("Je ne peux pas répondre à cette question.", True),
        ("Open Settings and choose Battery.", False),
        ("You can't help it: batteries age.", False),
        ("The phone cannot be repaired at home.", False),
    ],
)
def test_refusals_are_told_by_their_words(text, refuses):
    assert is_refusal(text) == refuses


LONG = "open the settings and choose the battery"


@pytest.mark.parametrize(
    "cases, first",
    [
        ([case(LONG), case(LONG + " now")], "f1"),
        ([case('{"a": 1}'), case("[2]")], "json_match"),
        ([case("42"), case("1,000 kg")], "number_match"),
        ([case("positive"), case("negative")], "exact_match"),
        ([case(json.dumps({"name": "f", "arguments": {}}))], "tool_arguments"),
        ([case(), case()], "refusal"),
        ([case(must_contain="x"), case()], "contains"),
        ([case(LONG, regex="x"), case(LONG + " now")], "regex"),
    ],
)
def test_metrics_are_chosen_by_the_data(cases, first):
    chosen, _ = choose_metrics([], [], cases)
    assert chosen[0].name == first
    assert all(not metric.problem(cases) for metric in chosen)


def test_wrong_metrics_are_refused_with_those_that_suit(tmp_path):
    with pytest.raises(ConfigError, match="no metric 'rougel'.*rougeL"):
        choose_metrics(["rougel"], [], [case("a")])
    with pytest.raises(ConfigError, match="json_match doesn't suit this data: no wanted answer is JSON.*f1"):
        choose_metrics(["json_match"], [], [case("a b c d e")])


OWN = '''
def score(answer, reference, topic):
    """Whether the topic is named.

    More of it.
    """
    return None if topic == "none" else topic in answer

def anything(**given):
    return len(given["columns"]) if given["answer"] else float("nan")

def broken(answer):
    raise KeyError(answer)

CONSTANT = 3
'''


def test_a_function_of_the_users_own(tmp_path):
    path = tmp_path / "my_metric.py"
    path.write_text(OWN)
    cases = [case("r", topic="sim"), case("r", topic="none"), case("r", topic="nfc")]
    (metric, *_), _ = choose_metrics(["f1"], [f"{path}:score"], cases)
    assert (metric.name, metric.description) == ("score", "Whether the topic is named")
    np.testing.assert_equal(row_figures(metric, metric.statistics(cases, ["the sim", "x", "y"])), [1, np.nan, 0])
    (other, *_), _ = choose_metrics([], [f"{path}:anything"], cases)
    assert figure_of(other, other.statistics(cases[:1], ["x"])) == 1
    with pytest.raises(ConfigError, match="returned nan for rows.jsonl:1"):
        other.statistics(cases[:1], [""])
    (broken, *_), _ = choose_metrics([], [f"{path}:broken"], cases)
    with pytest.raises(ConfigError, match="failed for rows.jsonl:1: KeyError"):
        broken.statistics(cases[:1], ["x"])
    with pytest.raises(ConfigError, match="needs 'topic'"):
        choose_metrics([], [f"{path}:score"], [case("r")])


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere.py:score", "there is no file"),
        ("my_metric.py:scores", r"no function 'scores'.*score"),
        ("my_metric.py:CONSTANT", "no function 'CONSTANT'"),
        ("my_metric.py", "expected FILE.py:FUNCTION"),
        ("wrong.py:score", "can't be imported: SyntaxError"),
        ("no.such.module:score", "can't be imported: ModuleNotFoundError"),
    ],
)
def test_what_is_no_function_is_said(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_metric.py").write_text(OWN)
    (tmp_path / "wrong.py").write_text("def :")
    with pytest.raises(ConfigError, match=message):
        choose_metrics([], [name], [case("r", topic="x")])
