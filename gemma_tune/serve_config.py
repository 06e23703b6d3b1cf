"""All settings of a server, with their defaults. config.py has those of a run."""

import dataclasses

from gemma_tune.config_checks import check_serve_values
from gemma_tune.settings import check_types


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """How a server is reached, what it accepts, and how much it does at once.

    Each setting is a flag of `gemma-tune serve`.

    Attributes:
        host: Address to listen at. Only this machine reaches the default.
        port: Port to listen at; 0: any free port.
        name: Name of the model in requests. Empty: the last part of `--model`.
        max_concurrent: Number of answers that are generated at the same time; others wait.
        max_tokens_in_flight: Size of the KV cache, in tokens: prompts and maximum answers of all answers that are being
            generated.
        max_length: Maximum length of a prompt and its answer together, in tokens.
        max_queued: Number of answers that may wait. Further requests get status 429.
        max_answers: Largest `n` of a request.
        max_body_bytes: Maximum size of a request's body, in bytes. Larger ones get status 413.
        request_timeout_seconds: Maximum duration of a request. Longer ones get status 504.
        drain_seconds: Time that running requests get to finish after SIGTERM or Ctrl-C.
        api_key_file: File of API keys, one a line, of which a request must send one. Empty: no key is needed.
        allowed_hosts: Host names that requests may address. Empty: any; but where only this machine reaches the server
            and no key is needed, `localhost`, `127.0.0.1` and `[::1]` alone, so that no web page can reach it by a name
            of its own that resolves to this machine (DNS rebinding).
        cors_origins: Origins of web pages that may send requests from a browser. Empty: none.
        feedback_db: SQLite file for users' feedback on answers. Empty: none is stored, and the chat page doesn't ask.
        log_requests: Whether a line is printed for each request. Questions and answers are never printed.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    max_concurrent: int = 8
    max_tokens_in_flight: int = 8192
    max_length: int = 2048
    max_queued: int = 64
    max_answers: int = 8
    max_body_bytes: int = 1_000_000
    request_timeout_seconds: float = 300.0
    drain_seconds: float = 30.0
    api_key_file: str = ""
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    feedback_db: str = "runs/feedback.db"
    log_requests: bool = False

    def __post_init__(self):
        check_types(self, "")
        check_serve_values(self)
