"""Defines who judges: the model, where it is served, its rubric, and how long it is waited for."""

import dataclasses
import os
from pathlib import Path

from gemma_tune.errors import ConfigError
from gemma_tune.evaluation.judge.prompts import DEFAULT_RUBRIC

KEY_VARIABLE = "OPENAI_API_KEY"
_NO_KEY = "none"  # A server of one's own asks for none, but the client wants one.


@dataclasses.dataclass(frozen=True)
class Judge:
    """A model behind an API like OpenAI's that judges answers.

    Attributes:
        url: URL of the API, up to and with its version, such as http://127.0.0.1:8000/v1.
        model: Name of the model there.
        api_key: Key of the API.
        rubric: What a good answer is, for the judge to read.
        cache_file: JSONL file of earlier replies, so that nothing is asked twice; None for no cache.
        num_concurrent: Most requests at a time.
        timeout_seconds: Most time for one reply.
        num_tries: Most tries for one reply, if the server fails or doesn't answer.
        backoff_seconds: Wait before the second try; each further wait is twice as long.
        max_reply_tokens: Most tokens of a reply.
        seed: Random seed that is sent along. The temperature is 0.
    """

    url: str
    model: str
    api_key: str = dataclasses.field(default=_NO_KEY, repr=False)
    rubric: str = DEFAULT_RUBRIC
    cache_file: Path | None = None
    num_concurrent: int = 8
    timeout_seconds: float = 60.0
    num_tries: int = 3
    backoff_seconds: float = 1.0
    max_reply_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(
                "The judge's URL should begin with http:// or https://, such as http://127.0.0.1:8000/v1, got "
                f"{self.url!r}."
            )
        if not self.model:
            raise ConfigError(f"Which model of {self.url} is the judge? Name it, such as --judge_model=gemma3_27b.")


def read_judge_key(key_file: str = "") -> str:
    """Returns the key of the judge's API: of a file, else of the variable OPENAI_API_KEY, else one that means none.

    Raises:
        ConfigError: The file can't be read or is empty.
    """
    if not key_file:
        return os.environ.get(KEY_VARIABLE) or _NO_KEY
    return _read_text(key_file, "--judge_key_file").strip()


def load_rubric(file: str = "") -> str:
    """Returns the rubric in a text file, or the default one without a file.

    Raises:
        ConfigError: The file can't be read or is empty.
    """
    return _read_text(file, "--rubric").strip() if file else DEFAULT_RUBRIC


def _read_text(file: str, flag: str) -> str:
    try:
        text = Path(os.path.expanduser(file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag}={file} can't be read: {getattr(error, 'strerror', None) or error}.") from error
    if not text.strip():
        raise ConfigError(f"{flag}={file} is empty.")
    return text
