"""Stores users' feedback on answers in one SQLite file: the chat page writes it, the next data set is made of it.

The file, whose `user_version` is 1 and whose `application_id` spells `gtfb`, has two tables:

    exchanges  id          text, chosen by the client
               created_at  UTC, ISO 8601; updated_at the same
               messages    JSON: [{"role": "system" | "user" | "model", "content": …}, …], up to the question answered
               sampling    JSON: settings of the request, such as {"temperature": 0.7}
               choice      position of the answer that is preferred to the others, or null
    answers    exchange_id, position (0, 1, …)
               model       name of the model in the request; version: of base and adapter, as in the server's replies
               text        the answer
               verdict     'up', 'down' or null
               correction  the text that the answer should have been, or null
"""

import contextlib
import datetime
import json
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.data import Turn
from gemma_tune.errors import DataError

_VERSION = 1
_APPLICATION_ID = int.from_bytes(b"gtfb", "big")
_LOCK_TIMEOUT_SECONDS = 10.0  # Time to wait while another process writes.
_TABLES = """
create table exchanges (
    id text primary key, created_at text not null, updated_at text not null, messages text not null,
    sampling text not null, choice integer
);
create table answers (
    exchange_id text not null references exchanges (id) on delete cascade, position integer not null,
    model text not null, version text not null, text text not null, verdict text check (verdict in ('up', 'down')),
    correction text, primary key (exchange_id, position)
);
"""


class RatedAnswer(NamedTuple):
    """An answer with the user's feedback on it.

    Attributes:
        model: Name of the model in the request.
        version: Version of its weights.
        text: The answer.
        verdict: `up`, `down` or "".
        correction: Text that the answer should have been, or "".
    """

    model: str
    version: str
    text: str
    verdict: str = ""
    correction: str = ""


class Exchange(NamedTuple):
    """A question with its answers and the feedback on them.

    Attributes:
        id: Id that the client chose.
        turns: Conversation up to the question.
        answers: One answer, or several to choose from.
        choice: Index of the answer that is preferred to the others; None: none was chosen.
        sampling: Sampling settings of the request.
        created_at, updated_at: Times in UTC, ISO 8601; set when the exchange is written.
    """

    id: str
    turns: tuple[Turn, ...]
    answers: tuple[RatedAnswer, ...]
    choice: int | None = None
    sampling: Mapping[str, Any] = {}
    created_at: str = ""
    updated_at: str = ""

    @property
    def has_feedback(self) -> bool:
        """Whether there is a verdict, a choice or a correction."""
        return self.choice is not None or any(answer.verdict or answer.correction for answer in self.answers)


class FeedbackStore:
    """A SQLite file of exchanges. Several threads and processes may use it at once.

    Args:
        path: Path of the file, which is created if it doesn't exist.

    Raises:
        DataError: The file can't be created, or is not a feedback file.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path).expanduser()
        with self._errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._connection() as connection:
                self._prepare(connection)

    def write(self, exchange: Exchange) -> None:
        """Writes an exchange in place of an earlier one with the same id. Without any feedback, it is only removed."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        messages = json.dumps(
            [{"role": turn.role, "content": turn.content} for turn in exchange.turns], ensure_ascii=False
        )
        with self._errors(), self._connection() as connection:
            row = connection.execute("select created_at from exchanges where id = ?", (exchange.id,)).fetchone()
            connection.execute("delete from exchanges where id = ?", (exchange.id,))
            if not exchange.has_feedback:
                return
            connection.execute(
                "insert into exchanges values (?, ?, ?, ?, ?, ?)",
                (exchange.id, row[0] if row else now, now, messages, json.dumps(exchange.sampling), exchange.choice),
            )
            connection.executemany(
                "insert into answers values (?, ?, ?, ?, ?, ?, ?)",
                [
                    (exchange.id, i, answer.model, answer.version, answer.text, answer.verdict or None,
                     answer.correction or None)
                    for i, answer in enumerate(exchange.answers)
                ],
            )  # fmt: skip

    def __iter__(self) -> Iterator[Exchange]:
        """Yields all exchanges, oldest first."""
        with self._errors(), self._connection() as connection:
            rows = connection.execute(
                "select id, messages, sampling, choice, created_at, updated_at from exchanges order by created_at, id"
            ).fetchall()
            for name, messages, sampling, choice, created_at, updated_at in rows:
                answers = connection.execute(
                    "select model, version, text, coalesce(verdict, ''), coalesce(correction, '') from answers "
                    "where exchange_id = ? order by position",
                    (name,),
                )
                turns = tuple(Turn(message["role"], message["content"]) for message in json.loads(messages))
                rated = tuple(RatedAnswer(*answer) for answer in answers)
                yield Exchange(name, turns, rated, choice, json.loads(sampling), created_at, updated_at)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Opens the file for one transaction."""
        with contextlib.closing(sqlite3.connect(self._path, timeout=_LOCK_TIMEOUT_SECONDS)) as connection:
            connection.execute("pragma foreign_keys = on")
            with connection:
                yield connection

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise DataError(f"{self._path} can't be used as a feedback file: {error}.") from error

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Creates the tables of a new file, and checks the version of an existing one."""
        connection.execute("begin immediate")  # If two processes open a new file, only one creates the tables.
        (application,) = connection.execute("pragma application_id").fetchone()
        (version,) = connection.execute("pragma user_version").fetchone()
        (num_tables,) = connection.execute("select count(*) from sqlite_master").fetchone()
        if num_tables == 0:
            for statement in _TABLES.split(";"):
                connection.execute(statement)
            connection.execute(f"pragma application_id = {_APPLICATION_ID}")
            connection.execute(f"pragma user_version = {_VERSION}")
        elif (application, version) != (_APPLICATION_ID, _VERSION):
            raise DataError(
                f"{self._path} is a SQLite file, but not a feedback file of version {_VERSION} (application_id "
                f"{application:#x}, user_version {version}). Choose another file with --feedback_db."
            )
