"""Metrics of answers: against sacrebleu, rouge-score, SciPy-like counts by hand, and by what they must not count."""

import json
import random

import numpy as np
import pytest

from gemma_tune.data import Turn
from gemma_tune.errors import ConfigError, DataError
from gemma_tune.evaluation.answers import words
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.judge.grading import JUDGE_GRADE
from gemma_tune.evaluation.likelihood.multiple_choice import CHOICE_METRICS
from gemma_tune.evaluation.metrics.choice import METRICS, OTHER_FIGURES, choose_metrics
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
    for answer, reference in (("set max_length", "max length"), ("a_b", "a_b c"), ("__init__", "init")):
        wanted = scorer.score(reference, answer)[name].fmeasure
        assert score(name, answer, reference) == pytest.approx(wanted, abs=1e-6), "underscores separate words"
    assert score("rouge1", "नमस्ते 电池", "नमस्ते 电池") == 1


@pytest.mark.parametrize(
    "text, found",
    [
        ("The max_length is 3.5", ["the", "max_length", "is", "3", "5"]),
        ("重启手机。", ["重", "启", "手", "机"]),
        ("3月にWi-Fiを", ["3", "月", "に", "wi", "fi", "を"]),
        ("ปิด ok", ["ป", "\u0e34", "ด", "ok"]),  # A vowel sign is a character too.
        ("नमस्ते दुनिया।", ["नमस्ते", "दुनिया"]),
        ("전화기를 다시", ["전화기를", "다시"]),
    ],
)
def test_words_of_all_scripts(text, found):
    """Where there are no spaces, each character counts: else a sentence would be one word, right or wrong as a whole."""
    assert words(text) == found


def test_f1_without_spaces_is_that_of_characters():
    assert score("f1", "请重启您的手机", "请重启您的电脑") == pytest.approx(5 / 7)
    assert score("f1", "再起動します", "電源を切る") == 0
    assert score("exact_match", "कि", "की") == 0, "vowel signs count"


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
        ("1 1/2 cups", 1.5),
        ("from -2 3/4", -2.75),
        ("2-1/2 inches", 2.5),
        ("1½ cups", 1.5),
        ("¾", 0.75),
        ("in 2024 1/2 of them", 0.5),
        ("1 234/2", 617),
        ("7 12/4", 3),
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
    code = "First:\n```python\nprint({})\n```\nThen:\n"
    assert score("json_match", code + '```json\n{"a": "```"}\n```', '{"a": "```"}') == 1, "behind another language"
    assert score("json_match", code + "```\n[1]\n```\nDone.", "[1]") == 1
    assert score("json_match", "```json [1]```", "[1]") == 1, "on one line"
    assert score("json_valid", code) == 0
    assert score("json_valid", "```yaml\n[1]\n```") == 0


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


def test_arguments_without_names_are_named_by_their_place():
    code = '```tool_code\nprint(weather("London", days=3))\n```'
    assert parse_tool_calls(code) == [("weather", {"0": "London", "days": 3})]
    assert score("tool_arguments", code, '```tool_code\nweather("London", days=3)\n```') == 1
    assert score("tool_arguments", code, '```tool_code\nweather("Paris", days=3)\n```') == 0
    by_name = json.dumps({"name": "weather", "arguments": {"location": "London", "days": 3}})
    assert [score(name, code, by_name) for name in ("tool_name", "tool_arguments")] == [1, 0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        '```tool_code\nprint("It is sunny.")\n```',
        "```tool_code\nweather(*places)\n```",
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
    "column, value, message",
    [
        ("regex", "(", "'regex' should be a regular expression, found '\\('.*--metrics"),
        ("pattern", 3, "'pattern' should be a regular expression, found 3"),
        ("json_schema", {"type": "objekt"}, "the JSON schema is wrong"),
        ("schema", "no json", "should be a JSON schema"),
        ("must_contain", [""], "'must_contain' should be a text or a list of texts"),
        ("must_not_contain", 3, "'must_not_contain' should be a text"),
    ],
)
def test_a_wrong_column_is_told_before_anything_is_answered(column, value, message):
    pytest.importorskip("jsonschema")
    good = {"regex": "x", "pattern": "x", "json_schema": {}, "schema": {}, "must_contain": "x", "must_not_contain": "x"}
    cases = [case(LONG, **{column: good[column]}), case(LONG, **{column: value})]
    with pytest.raises(DataError, match=f"rows.jsonl:1.*{message}"):
        choose_metrics([], [], cases)
    assert [metric.name for metric in choose_metrics(["f1"], [], cases)[0]] == ["f1"]


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
        ("I'm sorry to hear that. Hold Power for 12 seconds.", False),
        ("I am so sorry for the inconvenience! We will replace it.", False),
        ("I'm sorry that your phone is lost. Lock it at once.", False),
        ("I'm sorry you have to wait.", False),
        ("I apologize for the delay. Your parcel is on its way.", False),
        ("Es tut mir leid, das zu hören. Starten Sie neu.", False),
        ("Désolé pour le retard, votre colis arrive.", False),
        ("Siento oír eso. Lo siento por la espera.", False),
        ("Mi dispiace per il disagio.", False),
        ("Sinto muito pelo atraso.", False),
        ("I'm sorry to hear that, but I can't help with refunds.", True),
        ("I'm sorry to say that I can't answer.", True),
        ("I'm afraid I don't know.", True),
        ("I apologize, but that is out of scope.", True),
        ("Tut mir leid, dass ich nicht helfen kann.", True),
        ("Désolé de ne pas pouvoir vous aider.", True),
        ("Mi dispiace, ma non lo so.", True),
    ],
)
def test_refusals_are_told_by_their_words(text, refuses):
    assert is_refusal(text) == refuses


LONG = "open the settings and choose the battery"
CALLS = json.dumps({"name": "f", "arguments": {}})


@pytest.mark.parametrize(
    "cases, first",
    [
        ([case(LONG), case(LONG + " now")], "f1"),
        ([case('{"a": 1}'), case("[2]")], "json_match"),
        ([case("42"), case("1,000 kg")], "number_match"),
        ([case("positive"), case("negative")], "exact_match"),
        ([case(json.dumps({"name": "f", "arguments": {}}))], "tool_arguments"),
        ([case(), case()], "refusal"),
        ([case(CALLS), *[case(LONG)] * 20], "f1"),
        ([case(CALLS), *[case("{}")] * 20], "json_match"),
        ([*[case(CALLS)] * 2, case(LONG)], "tool_arguments"),
        ([case("北京"), case("上海市")], "exact_match"),
        ([case("请打开设置并选择电池，然后重新启动您的手机。"), case("请重启。")], "f1"),
        ([case("電源ボタンを長押しして再起動してください。")], "f1"),
        ([case("กรุณาเปิดการตั้งค่าแล้วเลือกแบตเตอรี่")], "f1"),
        ([case(must_contain="x"), case()], "contains"),
        ([case(LONG, regex="x"), case(LONG + " now")], "regex"),
    ],
)
def test_metrics_are_chosen_by_the_data(cases, first):
    chosen, _ = choose_metrics([], [], cases)
    assert chosen[0].name == first
    assert all(not metric.problem(cases) for metric in chosen)


def test_calls_among_texts_are_scored_as_both():
    """From one in ten on; a single one among many is no reason."""
    names = [metric.name for metric in choose_metrics([], [], [case(CALLS), *[case(LONG)] * 9])[0]]
    assert names[0] == "f1" and {"tool_arguments", "tool_name"} < set(names)
    names = [metric.name for metric in choose_metrics([], [], [case(CALLS), *[case(LONG)] * 20])[0]]
    assert "tool_name" not in names


def test_bleu_is_not_chosen_where_there_are_no_spaces():
    chinese = [case("请打开设置并选择电池，然后重新启动您的手机。"), case("请把手机放在充电器上，等待一小时再试。")]
    assert "bleu" not in [metric.name for metric in choose_metrics([], [], chinese)[0]]
    assert "chrf" in [metric.name for metric in choose_metrics([], [], chinese)[0]]


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

def f1(answer):
    return 1

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
    same = f"{path}:score"
    assert len(choose_metrics(["f1"], [same, same], cases)[0]) == 2, "the same function twice is one metric"
    other_file = tmp_path / "other.py"
    other_file.write_text("def score(answer):\n    return 1\n")
    for names, functions in (([], [f"{path}:f1"]), (["chrf"], [f"{path}:f1"]), (["f1"], [same, f"{other_file}:score"])):
        with pytest.raises(ConfigError, match="another metric that is called (f1|score). Rename the function"):
            choose_metrics(names, functions, cases)
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


def test_names_of_figures_that_are_no_metrics_of_answers_are_taken():
    assert {metric.name for metric in CHOICE_METRICS} | {JUDGE_GRADE} < set(OTHER_FIGURES)
