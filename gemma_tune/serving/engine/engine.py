"""Answers many requests at once with one model, each as if it were alone.

All programs are compiled at the start. Then the engine's thread repeats one loop: waiting requests are admitted to the
KV cache, a part of each new prompt is prefilled, and all running answers grow by one token in a single decode step
(continuous batching, as in Orca, OSDI 2022; chunked prefill between decode steps, as in Sarathi, arXiv:2308.16369). An
answer that ends makes room for the next at once.
"""

import threading
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

from gemma_tune.errors import ConfigError, EngineClosed
from gemma_tune.models.functional import check_text_only
from gemma_tune.models.sharding.placement import mesh_sharding_of
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.runtime.backend import keras
from gemma_tune.serving.engine.adapters import stacked_factors
from gemma_tune.serving.engine.answer import Answer, AnswerHandle, Deliver, stream_deltas
from gemma_tune.serving.engine.programs import PREFILL_CHUNK, Programs
from gemma_tune.serving.engine.request import BASE, AnswerDelta, Request
from gemma_tune.serving.engine.request_limits import check_request
from gemma_tune.serving.engine.scheduler import Scheduler
from gemma_tune.serving.engine.stats import EngineStats, num_compilations


class Engine:
    """A serving engine: takes requests from any thread, and answers them in a thread of its own.

    Attributes:
        tokenizer: The model's tokenizer.
        adapters: Names of the adapters, in the order in which they were given.
        max_length: Longest prompt and answer together, in tokens.
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        adapters: Mapping[str, Path] | None = None,
        max_concurrent: int,
        max_tokens_in_flight: int,
        max_length: int,
        max_queued: int,
    ):
        """Loads the adapters and allocates the cache. Nothing is compiled yet.

        Args:
            model: Model from `load_model`.
            adapters: Name -> adapter that training saved, all of them for this model.
            max_concurrent: Requests that are answered at once; others wait.
            max_tokens_in_flight: Size of the KV cache, in tokens: prompts and longest answers of all running requests.
            max_length: Longest prompt and answer together, in tokens.
            max_queued: Requests that may wait.

        Raises:
            ConfigError: The settings contradict each other, or the model lies on a mesh.
            ModelError: An adapter can't be used with the model.
        """
        adapters = adapters or {}
        if BASE in adapters:
            raise ConfigError("An adapter needs a name: --adapter=NAME=PATH.")
        check_text_only(model)
        if mesh_sharding_of(model.backbone) is not None:
            raise ConfigError("The serving engine computes on one device. Load the model without a mesh.")
        num_positions = -(-max_tokens_in_flight // PREFILL_CHUNK) * PREFILL_CHUNK
        if num_positions < max_length:
            raise ConfigError(
                f"max_tokens_in_flight must be at least max_length={max_length}, so that the longest request fits; got "
                f"{max_tokens_in_flight}."
            )
        self.tokenizer, self.adapters, self.max_length = tokenizer_of(model), tuple(adapters), max_length
        factors = stacked_factors(model, adapters)
        self._programs = Programs(model, factors, num_positions, max_length, max_concurrent)
        self._changed = threading.Condition()
        self._scheduler = Scheduler(self._programs, num_positions, max_concurrent, max_queued, self._changed)
        self._state = "new"  # Then running, draining, closed.
        self._thread: threading.Thread | None = None
        self._compilations_at_start = 0

    def start(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles every program that the engine will run, and begins to take requests.

        Args:
            progress: Function called with the number of programs that are ready, and the number of all.
        """
        if self._state != "new":
            raise EngineClosed("The engine has been started already.")
        self._programs.start(self._scheduler.batch_sizes, progress)
        self._compilations_at_start = num_compilations()
        self._state = "running"
        self._thread = threading.Thread(target=self._run, name="gemma_tune engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> AnswerHandle:
        """Queues a request and returns at once. Any thread may call it.

        Args:
            request: Request to answer.
            deliver: Function called with each delta of the answer, on the engine's thread, which waits for it. The last
                delta has a finish_reason. If the function raises, the request counts as cancelled.

        Raises:
            EngineFull: The request queue is full.
            EngineClosed: The engine isn't running.
            ConfigError: The request can never be answered; says why.
        """
        check_request(request, self.adapters, self.max_length, self._programs.vocabulary_size)
        handle = AnswerHandle(self._wake)
        adapter = 0 if request.adapter == BASE else 1 + self.adapters.index(request.adapter)
        answer = Answer(request, adapter, deliver, handle, self.tokenizer)
        with self._changed:
            if self._state != "running":
                raise EngineClosed(f"The engine takes no requests: it is {self._state}.")
            self._scheduler.enqueue(answer)
            self._changed.notify_all()
        return handle

    def stream(self, request: Request) -> Generator[AnswerDelta, None, None]:
        """Returns the deltas of one answer as they come. Closing the iterator cancels the answer.

        Raises what `submit` raises when the first delta is asked for.
        """
        return stream_deltas(self.submit, request)

    def drain(self, timeout_seconds: float) -> bool:
        """Takes no more requests, and waits until the present ones are answered. Returns whether they all are."""
        with self._changed:
            if self._state == "running":
                self._state = "draining"
            return self._changed.wait_for(lambda: self._scheduler.is_idle, timeout_seconds)

    def close(self) -> None:
        """Cancels all requests and ends the engine's thread."""
        with self._changed:
            self._state = "closed"
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return self._state == "running"

    @property
    def stats(self) -> EngineStats:
        """What the engine is doing and has done. Any thread may ask."""
        return self._scheduler.stats(num_compilations() - self._compilations_at_start)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._scheduler.advance()
            self._end_all("cancelled")
        except BaseException as error:
            self._end_all("error", f"The engine failed: {type(error).__name__}: {error}")
            raise

    def _wait_for_work(self) -> bool:
        """Returns whether there is work; False: the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._state == "closed" or not self._scheduler.is_idle)
            return self._state != "closed"

    def _end_all(self, reason: str, error: str = "") -> None:
        with self._changed:
            self._state = "closed"
        self._scheduler.end_all(reason, error)
