"""The settings of a server, their defaults, and their check: what config.py is to a run."""

import dataclasses

from gemma_tune.config_checks import check_serve_values
from gemma_tune.settings import check_types


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """How a server is reached, what it lets in, and how much it does at once. Each setting is a flag of `gemma-tune
    serve`.

    Attributes:
        host: Address to listen at. The default is reached from this machine alone.
        port: 0: a free one.
        name: The model's name in requests. Empty: the last part of `--model`.
        max_concurrent: Answers that are written at once; others wait.
        max_tokens_in_flight: Size of the key/value cache: prompts and longest answers of all that are written, in
            tokens.
        max_length: Longest prompt and answer together, in tokens.
        max_queued: Answers that may wait. When as many do, further requests get 429.
        max_answers: Largest `n` of a request.
        max_body_bytes: Longest body of a request; longer ones get 413.
        request_timeout_seconds: A request that takes longer is ended with 504.
        drain_seconds: After SIGTERM or Ctrl-C, how long requests under way may take to end.
        api_key_file: Keys, one a line; a request must bring one of them. Empty: none is needed.
        allowed_hosts: Names by which the server may be addressed; empty: as a server that only this machine reaches
            and that needs no key `localhost`, `127.0.0.1` and `[::1]`, which keeps out web pages that have a name of
            their own lead to this machine; else any.
        cors_origins: Web pages of other servers that may ask from a browser; empty: none.
        feedback_db: SQLite file for what users say of answers; empty: nothing is stored, and the page doesn't ask.
        log_requests: Prints a line for each request; never what was asked or answered.
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
