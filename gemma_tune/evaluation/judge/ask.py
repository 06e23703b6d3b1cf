"""Asks a judge many questions at a time, and goes on without what it doesn't answer.

Requests run in one event loop and not in threads, since a task can be ended at a deadline, whatever the server does:
also one that sends a byte now and then for ever.
"""

import asyncio
import concurrent.futures
import dataclasses
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from gemma_tune.errors import ConfigError
from gemma_tune.evaluation.judge.judge import Judge
from gemma_tune.evaluation.judge.reply_cache import ReplyCache, reply_key
from gemma_tune.evaluation.judge.verdicts import Verdict
from gemma_tune.runtime import progress

_RETRIED_STATUS = (408, 409, 425, 429)  # And all from 500.
_USELESS_STATUS = (401, 403, 404)  # A wrong key, model or URL: no other question would be answered either.
_MAX_WAIT_SECONDS = 30.0
_MAX_FAILURES = 5  # In a row, each after all its tries. Then the judge counts as gone.


class JudgeQuestion(NamedTuple):
    """A question to the judge.

    Attributes:
        prompt: Text of the question.
        read: Function that finds the verdict in a reply; None if there is none.
        complaint: What the judge is told when its first reply can't be read.
    """

    prompt: str
    read: Callable[[str], Verdict | None]
    complaint: str


class JudgeReply(NamedTuple):
    """What became of a question.

    Attributes:
        verdict: The verdict; None if the reply couldn't be read, or never came.
        problem: Why there is no verdict; '' if there is one.
        was_answered: Whether a reply came, readable or not.
    """

    verdict: Verdict | None
    problem: str
    was_answered: bool


class _Failed(Exception):
    """No reply came, after all tries."""


@dataclasses.dataclass
class _Session:
    """What the requests of one call share.

    Attributes:
        judge: The judge.
        client: OpenAI's client.
        openai: The package.
        options: Request fields that a server may refuse; it is asked without them then.
        num_failures: Number of questions in a row that got no reply.
        gone: Why the judge isn't asked any more; '' while it is.
    """

    judge: Judge
    client: Any
    openai: Any
    options: dict[str, Any]
    num_failures: int = 0
    gone: str = ""


def ask_judge(judge: Judge, questions: Sequence[JudgeQuestion], what: str) -> list[JudgeReply]:
    """Returns the judge's replies, in the order of the questions. It never raises because of the judge.

    Args:
        judge: The judge.
        questions: Questions. Those that are equal are asked once.
        what: Description of the questions for the progress bar, such as `judged answers`.

    Raises:
        ConfigError: The package openai isn't installed.
    """
    openai = _import_openai()
    cache = ReplyCache(judge.cache_file)
    with progress.track_progress(what, len(questions)) as advance:
        replies = _run(_ask_all(judge, questions, cache, openai, advance))
    _report(judge, replies)
    return replies


def _import_openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ConfigError("A judge needs the package openai. Run: pip install 'gemma-tune[judge]'") from error
    return openai


def _run(work: Coroutine[Any, Any, list[JudgeReply]]) -> list[JudgeReply]:
    """Runs a coroutine to its end, also in a notebook, where this thread has an event loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


async def _ask_all(
    judge: Judge, questions: Sequence[JudgeQuestion], cache: ReplyCache, openai: Any, advance: Callable[[int], None]
) -> list[JudgeReply]:
    counts = Counter(question.prompt for question in questions)
    waiting = iter({question.prompt: question for question in questions}.values())
    found: dict[str, JudgeReply] = {}

    async def work(session: _Session) -> None:
        for question in waiting:
            found[question.prompt] = await _ask(session, question, cache)
            advance(counts[question.prompt])

    options = {"temperature": 0, "seed": judge.seed, "max_tokens": judge.max_reply_tokens}
    async with openai.AsyncOpenAI(
        base_url=judge.url, api_key=judge.api_key, max_retries=0, timeout=judge.timeout_seconds
    ) as client:
        session = _Session(judge, client, openai, options)
        await asyncio.gather(*(work(session) for _ in range(judge.num_concurrent)))
    return [found[question.prompt] for question in questions]


async def _ask(session: _Session, question: JudgeQuestion, cache: ReplyCache) -> JudgeReply:
    """Returns the reply to a question: of the cache, of the judge, or of the judge after a complaint."""
    messages = [{"role": "user", "content": question.prompt}]
    key = reply_key(session.judge.model, messages, {"seed": session.judge.seed})
    kept = cache.get(key)
    verdict = None if kept is None else question.read(kept)
    if verdict is not None:
        return JudgeReply(verdict, "", True)
    try:
        text = await _complete(session, messages)
        verdict = question.read(text)
        if verdict is None:
            again = [
                {"role": "assistant", "content": text or "(nothing)"},
                {"role": "user", "content": question.complaint},
            ]
            text = await _complete(session, [*messages, *again])
            verdict = question.read(text)
    except _Failed as error:
        return JudgeReply(None, str(error), False)
    if verdict is None:
        return JudgeReply(None, f"the reply can't be read: {text!r:.200}", True)
    cache.put(key, text)
    return JudgeReply(verdict, "", True)


async def _complete(session: _Session, messages: list[dict[str, str]]) -> str:
    """Returns the judge's reply.

    Raises:
        _Failed: It didn't come, after all tries.
    """
    judge, problem, wait = session.judge, "", 0.0
    for number in range(judge.num_tries):
        await asyncio.sleep(min(wait, _MAX_WAIT_SECONDS))
        if session.gone:
            raise _Failed(session.gone)
        try:
            text = await _try_once(session, messages)
        except (session.openai.OpenAIError, OSError, ValueError, TimeoutError) as error:
            problem = _describe(error, judge)
            wait = max(judge.backoff_seconds * 2**number, _wanted_wait(error))
            status = getattr(error, "status_code", None)
            if status in _USELESS_STATUS:
                session.gone = problem
            if status is not None and status not in _RETRIED_STATUS and status < 500:
                break
        else:
            session.num_failures = 0
            return text
    session.num_failures += 1
    if session.num_failures >= _MAX_FAILURES and not session.gone:
        session.gone = f"{problem} ({session.num_failures} questions in a row)"
    raise _Failed(problem)


async def _try_once(session: _Session, messages: list[dict[str, str]]) -> str:
    """Returns the judge's reply to one request; again without an option that the server refuses."""
    judge = session.judge
    while True:
        asked = session.client.chat.completions.create(model=judge.model, messages=messages, **session.options)
        try:
            reply = await asyncio.wait_for(asked, judge.timeout_seconds)
        except session.openai.BadRequestError as error:
            if error.param not in session.options:
                raise
            del session.options[error.param]
            continue
        choices = getattr(reply, "choices", None)
        if not isinstance(choices, list) or not choices or not hasattr(choices[0], "message"):
            raise ValueError("the reply is not that of an OpenAI-compatible server")
        content = getattr(choices[0].message, "content", None)
        return content if isinstance(content, str) else ""


def _wanted_wait(error: Exception) -> float:
    """Returns how many seconds the server asks to wait (RFC 9110, section 10.2.3); 0 if it names none."""
    response = getattr(error, "response", None)
    seconds = "" if response is None else response.headers.get("retry-after", "")
    return float(seconds) if seconds.isdecimal() else 0.0


def _describe(error: Exception, judge: Judge) -> str:
    status = getattr(error, "status_code", None)
    if status is not None:
        hint = " (does the URL end with the version, such as /v1?)" if status == 404 else ""
        return f"HTTP {status}{hint}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, TimeoutError) or "timed out" in str(error).lower():
        return f"no reply within {judge.timeout_seconds:g} s"
    cause = error.__cause__ or error
    return f"{error} {cause if cause is not error else ''}".strip()


def _report(judge: Judge, replies: Sequence[JudgeReply]) -> None:
    """Prints how many questions have no verdict, and why."""
    silent = [reply.problem for reply in replies if not reply.was_answered]
    unreadable = [reply.problem for reply in replies if reply.was_answered and reply.verdict is None]
    for problems, what in ((silent, "did not answer"), (unreadable, "answered unreadably")):
        if problems:
            progress.console.print(
                f"The judge {judge.model} {what} {len(problems)} of {len(replies)} questions; they don't count. "
                f"The last problem: {problems[-1]}",
                style="yellow",
                markup=False,
            )
