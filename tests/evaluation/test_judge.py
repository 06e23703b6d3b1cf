"""The judge: what it is asked, what is read from its replies, and what becomes of servers that fail."""

import asyncio
import contextlib
import http.server
import json
import math
import re
import threading
import time

import pytest

from gemma_tune.data import Turn
from gemma_tune.errors import ConfigError
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.judge.ask import JudgeQuestion, ask_judge
from gemma_tune.evaluation.judge.grading import judge_metric
from gemma_tune.evaluation.judge.judge import Judge, load_rubric, read_judge_key
from gemma_tune.evaluation.judge.pairwise import PairVerdict, PairwiseResult, judge_pairs
from gemma_tune.evaluation.judge.prompts import DEFAULT_RUBRIC, grade_prompt, pair_prompt
from gemma_tune.evaluation.judge.verdicts import read_grade, read_verdict

CASES = [EvalCase((Turn("user", f"question {i}"),), f"reference {i}", {}, f"q.jsonl:{i}") for i in range(6)]


@contextlib.contextmanager
def judge_server(reply):
    """A server at whose API `reply(body, number)` gives the text of each reply, or (status, bytes, headers).

    Yields the URL and the list of bodies that came.
    """
    bodies, ended, lock = [], threading.Event(), threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                bodies.append(body | {"path": self.path, "authorization": self.headers["authorization"]})
                number = len(bodies)
            said = reply(body, number)
            if said is None:  # A byte now and then, and never an end.
                self.send_response(200)
                self.send_header("content-length", "1000")
                self.end_headers()
                with contextlib.suppress(OSError):
                    while not ended.wait(0.02):
                        self.wfile.write(b" ")
                return
            if isinstance(said, str):
                choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
                said = 200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode(), {}
            status, content, headers = said
            self.send_response(status)
            for name, value in {
                "content-type": "application/json",
                "content-length": str(len(content)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def judge_at(url, **settings):
    return Judge(url, "big", **{"backoff_seconds": 0.0, "timeout_seconds": 5.0, **settings})


def texts_of(body):
    """What stands between the tags of a request, by their names."""
    return dict(re.findall(r"<([\w]+)-[0-9a-f]{8}>\n(.*?)\n</\1-", body["messages"][0]["content"], re.DOTALL))


def verdict(value):
    return json.dumps({"reason": "so", "verdict": value})


def prefers(preference):
    """A judge that prefers the answer for which `preference` is higher."""

    def reply(body, number):
        texts = texts_of(body)
        first, second = preference(texts["answer_A"]), preference(texts["answer_B"])
        return verdict("tie" if first == second else "A" if first > second else "B")

    return reply


@pytest.mark.parametrize(
    "text, wanted",
    [
        ('{"reason": "x", "verdict": "A"}', "A"),
        ('Sure!\n```json\n{"verdict": "b", "reason": "{odd"}\n```\nDone.', "B"),
        ('{"Verdict": "Answer_A"}', "A"),
        ('{"verdict": "TIE."}', "tie"),
        ('{"verdict": "A"} no, wait: {"verdict": "B"}', "B"),
        ('<think>{"verdict": "A"}</think>{"verdict": "B"}', "B"),
        ('{"steps": [1, 2]}\n{"verdict": "B", "reason": ', "B"),
        ("**Verdict:** tie", "tie"),
        ("The verdict is a tie.", "tie"),
        ("Final verdict: [[B]]", "B"),
        ("[[C]]", "tie"),
        (" B.", "B"),
        ("Answer A", "A"),
        ("verdict: A", "A"),
        ("verdict: a better answer is the second", None),
        ("A good answer, and B as well.", None),
        ('{"verdict": "both of them, in a way"}', None),
        ('{"verdict": 1}', None),
        ("<think>The verdict is A", None),
        ("{" * 100_000, None),
        ("", None),
    ],
)
def test_verdicts_are_read(text, wanted):
    found = read_verdict(text)
    assert (found and found.value) == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ('{"reason": "x", "grade": 4}', 4), ('{"grade": "5"}', 5), ('{"grade": "3/5"}', 3), ('{"grade": 4.5}', 4.5), ("Grade: 2", 2), ("**Grade**: 4/5", 4),
        ("[[5]]", 5), ("3", 3), ('{"grade": 0}', None), ('{"grade": 6}', None), ('{"grade": true}', None), ('{"grade": NaN}', None), ("Grade: 45", None),
        ("In 2 of 5 cases", None), ("", None),
    ],
)  # fmt: skip
def test_grades_are_read(text, wanted):
    found = read_grade(text)
    assert (found and found.value) == wanted


def test_what_the_judge_is_asked():
    case = EvalCase(
        (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("model", "Hello"), Turn("user", "How?")), "So.", {}
    )
    prompt = pair_prompt("RUBRIC", case, "first answer", "second </answer_A> answer")
    texts = texts_of({"messages": [{"content": prompt}]})
    assert texts == {
        "conversation_so_far": "system: Be brief.\nuser: Hi\nmodel: Hello",
        "question": "How?",
        "reference_answer": "So.",
        "answer_A": "first answer",
        "answer_B": "second </answer_A> answer",
    }
    assert "Rubric:\nRUBRIC" in prompt and '"verdict"' in prompt
    without = grade_prompt(DEFAULT_RUBRIC, EvalCase((Turn("user", "How?"),), "", {}), "lone \ud800 surrogate")
    assert texts_of({"messages": [{"content": without}]}) == {"question": "How?", "answer": "lone ? surrogate"}
    assert '"grade"' in without


def test_a_verdict_counts_if_both_orders_agree():
    """A judge that prefers the longer answer. The tags' names differ from pair to pair, and equal answers aren't asked."""
    answers = ["long answer", "x", "same", "equal", "good good good", "no"]
    others = ["short", "longer", "same ", "equil", "bad", "no way"]
    with judge_server(prefers(len)) as (url, bodies):
        result = judge_pairs(judge_at(url), CASES, answers, others)
    assert [row.outcome for row in result.verdicts] == ["win", "loss", "tie", "tie", "win", "loss"]
    assert result.verdicts[0].verdicts == ("A", "B") and result.verdicts[0].reasons == ("so", "so")
    assert result.verdicts[2].verdicts == () and len(bodies) == 10
    assert (result.agreement, result.first_position_share, result.win_rate, result.p_value) == (1, 0.5, 0.5, 1)
    assert len({re.search(r"<question-(\w+)>", body["messages"][0]["content"])[1] for body in bodies}) == 10
    body = bodies[0]
    assert (body["model"], body["temperature"], body["seed"], body["path"]) == ("big", 0, 0, "/v1/chat/completions")
    assert body["authorization"] == "Bearer none" and DEFAULT_RUBRIC in body["messages"][0]["content"]


def test_a_judge_that_likes_the_first_answer_decides_nothing():
    with judge_server(lambda body, number: verdict("A")) as (url, _):
        result = judge_pairs(judge_at(url), CASES, list("abcdef"), list("uvwxyz"))
    assert {row.outcome for row in result.verdicts} == {"tie"}
    assert (result.agreement, result.first_position_share) == (0, 1)
    assert math.isnan(result.p_value) and result.to_dict()["p_value"] is None


def test_figures_of_verdicts():
    """Counted by hand: 9 wins, 1 loss, 2 ties, of which one was not agreed on. Sign test: 2 · (1 + 10) / 2¹⁰."""
    rows = [PairVerdict("win", ("A", "B"), ("", ""))] * 9 + [PairVerdict("loss", ("B", "A"), ("", ""))]
    rows += [PairVerdict("tie", ("A", "A"), ("", "")), PairVerdict("tie", (), ())]
    rows += [PairVerdict("unreadable", ("", "A"), ("", "")), PairVerdict("unanswered", ("", ""), ("", ""))]
    result = PairwiseResult(rows)
    assert result.win_rate == pytest.approx((9 + 2 / 2) / 12)
    assert result.agreement == pytest.approx(10 / 11)
    assert result.first_position_share == pytest.approx(12 / 22)
    assert result.p_value == pytest.approx(2 * (1 + 10) / 2**10)
    assert result.interval.low < result.win_rate < result.interval.high <= 1
    plain = json.loads(json.dumps(result.to_dict()))
    assert [plain[f"num_{name}"] for name in ("wins", "ties", "losses", "unreadable", "unanswered")] == [9, 2, 1, 1, 1]
    assert len(plain["rows"]) == 14
    empty = PairwiseResult([])
    assert math.isnan(empty.win_rate) and math.isnan(empty.agreement) and math.isnan(empty.first_position_share)


def test_grades_are_a_metric():
    with judge_server(
        lambda body, number: json.dumps({"grade": {"good": 5, "fair": 2.5, "odd": 9}[texts_of(body)["answer"]]})
    ) as (url, bodies):
        metric = judge_metric(judge_at(url, rubric="MINE"))
        statistics = metric.statistics(CASES[:4], ["good", "odd", "fair", "good"])
    assert statistics.tolist() == [[5, 1], [0, 0], [2.5, 1], [5, 1]]
    assert metric.figure(statistics.sum(0)) == pytest.approx(12.5 / 3)
    assert metric.problem(CASES) == "" and metric.is_higher_better
    assert "Rubric:\nMINE" in bodies[0]["messages"][0]["content"]
    assert len(bodies) == 5  # The unreadable one was asked twice.


def test_an_unreadable_reply_is_complained_of_once():
    def reply(body, number):
        is_again, texts = len(body["messages"]) == 3, texts_of(body)
        return (
            verdict("A" if texts["answer_A"] == "good" else "B")
            if is_again and "never" not in texts.values()
            else "Hm, hm."
        )

    with judge_server(reply) as (url, bodies):
        result = judge_pairs(judge_at(url), CASES[:2], ["good", "never"], ["bad", "bad"])
    assert [row.outcome for row in result.verdicts] == ["win", "unreadable"]
    assert "can't be read: 'Hm, hm.'" in result.verdicts[1].reasons[0]
    again = next(body["messages"] for body in bodies if len(body["messages"]) == 3)
    assert [message["role"] for message in again] == ["user", "assistant", "user"]
    assert again[1]["content"] == "Hm, hm." and "no verdict that can be read" in again[2]["content"]
    assert len(bodies) == 8


def test_nothing_is_asked_twice(tmp_path):
    file = tmp_path / "deep" / "judge.jsonl"
    with judge_server(prefers(len)) as (url, bodies):
        ours = judge_at(url, cache_file=file)
        first = judge_pairs(ours, CASES, list("abcdef"), ["xx"] * 6)
        assert len(bodies) == 12
        file.write_bytes(file.read_bytes() + b'{"key": "damaged\n[]\n7\n{"key": "no reply"}\n\xff\n')
        assert judge_pairs(ours, CASES, list("abcdef"), ["xx"] * 6) == first
        assert len(bodies) == 12
        for other in (
            judge_at(url, cache_file=file, rubric="Another."),
            Judge(url, "bigger", cache_file=file),
            judge_at(url, cache_file=file, seed=1),
        ):
            judge_pairs(other, CASES[:1], ["a"], ["xx"])
        assert len(bodies) == 18
        judge_pairs(ours, CASES[:1], ["a"], ["another"])
        assert len(bodies) == 20
    assert judge_pairs(ours, CASES, list("abcdef"), ["xx"] * 6) == first  # The server is gone.


def test_equal_questions_are_asked_once_and_unreadable_replies_are_not_kept(tmp_path):
    file = tmp_path / "judge.jsonl"
    with judge_server(lambda body, number: "Hm.") as (url, bodies):
        for _ in range(2):
            found = ask_judge(judge_at(url, cache_file=file), [JudgeQuestion("?", read_grade, "!")] * 5, "questions")
            assert [(reply.verdict, reply.was_answered) for reply in found] == [(None, True)] * 5
    assert len(bodies) == 4 and not file.exists()


def test_a_cache_that_can_not_be_written_costs_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with judge_server(prefers(len)) as (url, _):
        result = judge_pairs(judge_at(url, cache_file=tmp_path / "file" / "judge.jsonl"), CASES[:1], ["aa"], ["b"])
    assert result.count("win") == 1


@pytest.mark.parametrize(
    "failure",
    [
        (500, b"oops", {}),
        (503, b"{}", {"retry-after": "0"}),
        (429, b'{"error": {"message": "slow down"}}', {}),
        (200, b"<html>garbage</html>", {"content-type": "text/html"}),
        (200, b"{garbage", {}),
        (200, b"\xff\xfe", {}),
        (200, b'{"choices": 7}', {}),
        (200, b'{"choices": [{"message": 7}]}', {}),
        (200, b"[]", {}),
        (200, b"null", {}),
    ],
    ids=lambda failure: f"{failure[0]} {failure[1]!r}",
)
def test_a_server_that_fails_once_is_asked_again(failure):
    """Of a server that always fails, rows are counted, and nothing is raised."""
    with judge_server(lambda body, number: failure if number == 1 else verdict("tie")) as (url, bodies):
        result = judge_pairs(judge_at(url), CASES[:2], ["a", "b"], ["c", "d"])
        assert [row.outcome for row in result.verdicts] == ["tie", "tie"]
        assert len(bodies) == 5
    with judge_server(lambda body, number: failure) as (url, bodies):
        result = judge_pairs(judge_at(url), CASES[:2], ["a", "b"], ["c", "d"])
    assert {row.outcome for row in result.verdicts} <= {"unanswered", "unreadable"}
    assert all(row.reasons[0] for row in result.verdicts)


def test_what_came_is_kept_and_what_did_not_is_reported(capsys):
    def reply(body, number):
        return (500, b"oops", {}) if "bad" in texts_of(body).values() else verdict("tie")

    with judge_server(reply) as (url, bodies):
        result = judge_pairs(judge_at(url), CASES[:3], ["a", "bad", "c"], ["x", "y", "z"])
    assert [row.outcome for row in result.verdicts] == ["tie", "unanswered", "tie"]
    assert result.verdicts[1].reasons[0].startswith("HTTP 500")
    assert len(bodies) == 4 + 2 * 3
    said = " ".join(capsys.readouterr().err.split())
    assert "The judge big did not answer 2 of 6 questions; they don't count. The last problem: HTTP 500" in said


@pytest.mark.parametrize("status, hint", [(401, "HTTP 401"), (404, "end with the version, such as /v1")])
def test_a_wrong_key_or_url_is_not_tried_again(status, hint):
    with judge_server(lambda body, number: (status, b'{"error": {"message": "no"}}', {})) as (url, bodies):
        result = judge_pairs(judge_at(url, num_concurrent=1), CASES, list("abcdef"), list("uvwxyz"))
    assert result.count("unanswered") == 6 and hint in result.verdicts[5].reasons[1]
    assert len(bodies) == 1


def test_a_question_that_is_refused_is_not_tried_again():
    with judge_server(lambda body, number: (400, b'{"error": {"message": "too long"}}', {})) as (url, bodies):
        result = judge_pairs(judge_at(url, num_concurrent=1), CASES[:1], ["a"], ["b"])
    assert result.count("unanswered") == 1 and "too long" in result.verdicts[0].reasons[0] and len(bodies) == 2


def test_options_that_a_server_refuses_are_left_out():
    def reply(body, number):
        refused = next((name for name in ("max_tokens", "temperature") if name in body), None)
        error = {"message": f"Unsupported parameter: {refused}", "param": refused, "code": "unsupported_parameter"}
        return (400, json.dumps({"error": error}).encode(), {}) if refused else verdict("tie")

    with judge_server(reply) as (url, bodies):
        result = judge_pairs(judge_at(url, num_concurrent=1), CASES[:3], list("abc"), list("xyz"))
    assert result.count("tie") == 3 and len(bodies) == 6 + 2
    assert bodies[-1].keys() >= {"seed", "model"} and not bodies[-1].keys() & {"max_tokens", "temperature"}


def test_a_judge_that_never_answers_is_given_up():
    """A server that sends a byte now and then defeats a timeout between two bytes, but not one of the whole reply."""
    start = time.monotonic()
    with judge_server(lambda body, number: None) as (url, bodies):
        impatient = judge_at(url, timeout_seconds=0.1, num_tries=2, num_concurrent=4)
        result = judge_pairs(impatient, CASES * 10, ["a"] * 60, [str(i) for i in range(60)])
    assert result.count("unanswered") == 60
    assert "no reply within 0.1 s" in result.verdicts[0].reasons[0] and "in a row" in result.verdicts[-1].reasons[0]
    assert len(bodies) <= 16  # And not 240: after five failures in a row, nothing is asked any more.
    assert time.monotonic() - start < 60 * 2 * 2 * 0.1 / 4  # The time that asking everything would take.


def test_waits_grow_and_are_as_long_as_the_server_asks(monkeypatch):
    waited, sleep = [], asyncio.sleep

    async def record(seconds, *arguments):
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", record)
    failures = iter(
        [
            (503, b"", {}),
            (429, b"", {"retry-after": "7"}),
            (503, b"", {"retry-after": "4000"}),
            (503, b"", {"retry-after": "Mon, 1"}),
        ]
    )
    with judge_server(lambda body, number: next(failures, "[[4]]")) as (url, bodies):
        patient = judge_at(url, num_concurrent=1, num_tries=5, backoff_seconds=0.5)
        (reply,) = ask_judge(patient, [JudgeQuestion("?", read_grade, "!")], "questions")
    assert reply.verdict.value == 4 and len(bodies) == 5
    assert [seconds for seconds in waited if seconds] == [0.5, 7, 30, 4]


def test_no_more_requests_at_a_time_than_allowed():
    under_way, most, lock = set(), [], threading.Lock()

    def reply(body, number):
        with lock:
            under_way.add(number)
            most.append(len(under_way))
        time.sleep(0.02)
        with lock:
            under_way.remove(number)
        return "[[4]]"

    with judge_server(reply) as (url, bodies):
        ask_judge(
            judge_at(url, num_concurrent=3), [JudgeQuestion(str(i), read_grade, "!") for i in range(12)], "questions"
        )
    assert len(bodies) == 12 and max(most) == 3


def test_nobody_listens():
    result = judge_pairs(judge_at("http://127.0.0.1:9/v1"), CASES, list("abcdef"), list("uvwxyz"))
    assert result.count("unanswered") == 6 and "Connection error" in result.verdicts[0].reasons[0]


def test_in_a_notebook_which_has_an_event_loop_already():
    async def cell():
        return judge_pairs(judge_at(url), CASES[:1], ["aa"], ["b"])

    with judge_server(prefers(len)) as (url, _):
        assert asyncio.run(cell()).count("win") == 1


def test_key_and_rubric(write, monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert read_judge_key() == "none" and load_rubric() == DEFAULT_RUBRIC
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    assert read_judge_key() == "sk-1"
    assert read_judge_key(str(write("key", "sk-2\n"))) == "sk-2"
    assert load_rubric(str(write("rubric.md", "Be kind.\n"))) == "Be kind."
    assert "sk-3" not in repr(Judge("http://a/v1", "m", "sk-3"))
    with pytest.raises(ConfigError, match="--judge_key_file=.*missing can't be read: No such file"):
        read_judge_key(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="--rubric=.*empty is empty"):
        load_rubric(str(write("empty", " \n")))


@pytest.mark.parametrize(
    "url, model, message", [("localhost:8000", "m", "begin with http"), ("http://a/v1", "", "--judge_model")]
)
def test_a_judge_that_can_not_be_asked(url, model, message):
    with pytest.raises(ConfigError, match=message):
        Judge(url, model)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'gemma-tune\[judge\]'"):
        judge_pairs(Judge("http://a/v1", "m"), CASES[:1], ["a"], ["b"])
