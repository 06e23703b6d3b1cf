"""What users say of answers: the file, and the way into it."""

import sqlite3
import threading
import uuid

import pytest

from gemma_tune.data import Turn
from gemma_tune.errors import DataError
from gemma_tune.serving.feedback import Exchange, FeedbackStore, RatedAnswer

EXCHANGE = Exchange(
    "one",
    (Turn("system", "Be kind."), Turn("user", "Wie geht’s?"), Turn("model", "Gut."), Turn("user", "Why?")),
    (RatedAnswer("tuned", "v1+a", "Because.", "down", "Because of you."), RatedAnswer("base", "v1", "I\n\tdon't know")),
    0,
    {"temperature": 0.5, "seed": 3},
)


@pytest.fixture
def store(tmp_path):
    return FeedbackStore(tmp_path / "made" / "feedback.db")


def test_an_exchange_comes_back_as_it_was_written(store, tmp_path):
    store.write(EXCHANGE)
    (read,) = FeedbackStore(tmp_path / "made" / "feedback.db")
    assert read._replace(created_at="", updated_at="") == EXCHANGE
    assert read.created_at == read.updated_at and read.created_at.endswith("+00:00")


def test_any_sqlite_reader_sees_the_documented_tables(store, tmp_path):
    store.write(EXCHANGE)
    with sqlite3.connect(tmp_path / "made" / "feedback.db") as reader:
        assert reader.execute("pragma user_version").fetchone() == (1,)
        rows = reader.execute(
            "select model, verdict, correction, json_extract(messages, '$[1].content') from answers "
            "join exchanges on id = exchange_id order by position"
        ).fetchall()
    assert rows == [("tuned", "down", "Because of you.", "Wie geht’s?"), ("base", None, None, "Wie geht’s?")]
    reader.close()


def test_the_same_id_replaces_and_nothing_said_takes_back(store):
    store.write(EXCHANGE)
    (first,) = store
    store.write(EXCHANGE._replace(choice=1))
    (second,) = store
    assert (second.choice, second.created_at) == (1, first.created_at)
    assert second.updated_at >= first.updated_at
    silent = tuple(answer._replace(verdict="", correction="") for answer in EXCHANGE.answers)
    store.write(EXCHANGE._replace(choice=None, answers=silent))
    assert list(store) == []


def test_several_threads_and_stores_write_at_once(tmp_path):
    stores = [FeedbackStore(tmp_path / "f.db") for _ in range(4)]

    def write(store, name):
        for index in range(10):
            store.write(EXCHANGE._replace(id=f"{name}-{index}"))

    threads = [threading.Thread(target=write, args=(store, name)) for name, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(stores[0])) == 40


def test_what_is_no_file_of_feedback_is_refused_and_left_alone(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("My notes. " * 200)
    with pytest.raises(DataError, match="not a database"):
        FeedbackStore(text)
    assert text.read_text() == "My notes. " * 200
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("create table mine (a)")
    connection.close()
    with pytest.raises(DataError, match="not a feedback file of version 1"):
        FeedbackStore(other)
    with pytest.raises(DataError, match="can't be used"):
        FeedbackStore(tmp_path)


def body(**changes):
    answers = [
        {"model": "t", "version": "v1+a", "text": "Hi", "verdict": "up", "correction": None},
        {"model": "m", "version": "v1", "text": "Hm"},
    ]
    said = {"id": uuid.uuid4().hex, "messages": [{"role": "user", "content": "Hello"}], "answers": answers, "choice": 0}
    return {**said, "sampling": {"temperature": 0.5}, **changes}


def test_feedback_over_http(scripted, store):
    client = scripted(store=store)
    said = body()
    assert client.post("/feedback", json=said).json() == {"stored": True}
    (read,) = store
    assert read.turns == (Turn("user", "Hello"),)
    assert read.answers == (RatedAnswer("t", "v1+a", "Hi", "up"), RatedAnswer("m", "v1", "Hm"))
    assert (read.choice, read.sampling) == (0, {"temperature": 0.5})
    silent = [{**answer, "verdict": None} for answer in said["answers"]]
    assert client.post("/feedback", json={**said, "choice": None, "answers": silent}).json() == {"stored": False}
    assert list(store) == []


@pytest.mark.parametrize(
    ("change", "param"),
    [({"id": "short"}, "id"), ({"id": "../../etc/x"}, "id"), ({"choice": 2}, "choice"), ({"answers": []}, "answers"),
     ({"messages": [{"role": "root", "content": ""}]}, "messages[0].role"), ({"more": 1}, "more"),
     ({"sampling": {"a": []}}, None), ({"answers": [{"model": "m", "version": "v", "text": "\ud800"}]}, "answers[0].text")],
)  # fmt: skip
def test_wrong_feedback_is_refused(scripted, store, change, param):
    import json

    reply = scripted(store=store).post(
        "/feedback", content=json.dumps(body(**change)), headers={"content-type": "application/json"}
    )
    assert reply.status_code == 400
    assert param is None or reply.json()["error"]["param"] == param
    assert list(store) == []


def test_a_server_without_a_file_stores_nothing(scripted):
    client = scripted()
    reply = client.post("/feedback", json=body())
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "no_feedback")
    assert client.get("/page-settings").json()["feedback"] is False


def test_a_disk_that_fails_is_said(scripted, store, tmp_path):
    client = scripted(store=store)
    (tmp_path / "made" / "feedback.db").unlink()
    (tmp_path / "made" / "feedback.db").mkdir()
    reply = client.post("/feedback", json=body())
    assert reply.status_code == 500 and "can't be used as a feedback file" in reply.json()["error"]["message"]
