"""The serving engine: many requests at once on one model, each answered as if it were alone.

All programs are compiled at the start. Then a thread of the engine's repeats: requests whose turn has come get a slot
and a region of the cache, a piece of each new prompt is read, and all answers under way grow by one token in one step
(continuous batching, as in Orca, OSDI 2022; pieces of prompts between steps as in Sarathi, arXiv:2308.16369). An answer
that is done makes room for the next at once.
"""

import collections
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from gemma_tune.data import ChatTemplate, template_for
from gemma_tune.errors import ConfigError, EngineClosed, EngineFull
from gemma_tune.models.family import family_of
from gemma_tune.models.functional import check_text_only
from gemma_tune.models.sharding.placement import mesh_sharding_of
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.runtime.backend import keras
from gemma_tune.serving.engine.adapters import stacked_factors
from gemma_tune.serving.engine.answer import Answer, AnswerHandle, Deliver, stream_deltas
from gemma_tune.serving.engine.kv_cache import KVCacheAllocator
from gemma_tune.serving.engine.programs import PREFILL_CHUNK, DecodeBatch, Programs
from gemma_tune.serving.engine.request import BASE, AnswerDelta, Request
from gemma_tune.serving.engine.request_limits import check_request
from gemma_tune.serving.engine.stats import EngineStats, num_compilations

_PROMPT_TOKENS_A_STEP = (
    4 * PREFILL_CHUNK
)  # So that a long prompt holds the answers under way up for so long and no longer.


class Engine:
    """Answers requests. See the module.

    Attributes:
        tokenizer: The model's.
        family: `gemma3` and its like.
        template: Its chat template.
        adapters: Names of the adapters, in their order.
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
        """Loads the adapters and makes the cache. Nothing is compiled yet.

        Args:
            model: From `load_model`.
            adapters: Name -> what training saved; all for this model.
            max_concurrent: Requests that are answered at once; others wait.
            max_tokens_in_flight: Size of the key/value cache: prompts and longest answers of all requests under way, in
                tokens.
            max_length: Longest prompt and answer together, in tokens.
            max_queued: Requests that may wait.
        """
        adapters = adapters or {}
        if BASE in adapters:
            raise ConfigError("An adapter needs a name: --adapter=NAME=PATH.")
        check_text_only(model)
        if mesh_sharding_of(model.backbone) is not None:
            raise ConfigError("The serving engine computes on one device. Load the model without a mesh.")
        self.tokenizer, self.family = tokenizer_of(model), family_of(model)
        self.template: ChatTemplate = template_for(self.family)
        self.adapters, self.max_length = tuple(adapters), max_length
        self._max_concurrent, self._max_queued = max_concurrent, max_queued
        self._positions = -(-max_tokens_in_flight // PREFILL_CHUNK) * PREFILL_CHUNK
        if self._positions < max_length:
            raise ConfigError(
                f"max_tokens_in_flight must be at least max_length={max_length}, got "
                f"{max_tokens_in_flight}: the longest request must fit."
            )
        factors = stacked_factors(model, adapters)
        self._programs = Programs(model, factors, self._positions, max_length, max_concurrent)
        self._regions = KVCacheAllocator(self._positions, PREFILL_CHUNK)
        self._row_counts = _row_counts(max_concurrent)
        self._queue: collections.deque[Answer] = collections.deque()
        self._slots: list[Answer | None] = [None] * max_concurrent
        self._changed = threading.Condition()
        self._state = "new"  # Then running, draining, closed.
        self._thread: threading.Thread | None = None
        self._requests: collections.Counter[str] = collections.Counter()
        self._totals: collections.Counter[str] = collections.Counter()
        self._seconds, self._compilations_at_start = 0.0, 0

    def start(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles every program there will be, and begins to take requests.

        Args:
            progress: Called with how many programs are ready, and how many there are.
        """
        if self._state != "new":
            raise EngineClosed("The engine has been started already.")
        self._programs.start(self._row_counts, progress)
        self._compilations_at_start = num_compilations()
        self._state = "running"
        self._thread = threading.Thread(target=self._run, name="gemma_tune engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> AnswerHandle:
        """Asks for an answer, and returns at once. Any thread may call it.

        Args:
            request: What is asked.
            deliver: Called with each piece, from the engine's thread, which it holds up; the last piece has a
                finish_reason. If it raises, the request counts as cancelled.

        Raises:
            EngineFull: As many requests wait as may.
            EngineClosed: No requests are taken.
            ConfigError: The request can't be answered whenever it is asked; says why.
        """
        check_request(request, self.adapters, self.max_length, self._programs.vocabulary_size)
        handle = AnswerHandle(self._wake)
        adapter = 0 if request.adapter == BASE else 1 + self.adapters.index(request.adapter)
        answer = Answer(request, adapter, deliver, handle, self.tokenizer)
        with self._changed:
            if self._state != "running":
                raise EngineClosed(f"The engine takes no requests: it is {self._state}.")
            waiting = len(self._queue) - sum(slot is None for slot in self._slots)
            if waiting >= self._max_queued:
                raise EngineFull(f"{self._max_queued} requests are waiting already (max_queued).")
            self._queue.append(answer)
            self._changed.notify_all()
        return handle

    def stream(self, request: Request) -> Iterator[AnswerDelta]:
        """Returns the pieces of one answer as they come; leaving them cancels it. Errors come with the first."""
        return stream_deltas(self.submit, request)

    def drain(self, timeout_seconds: float) -> bool:
        """Takes no more requests, and waits until those there are have been answered. Returns whether they have."""
        with self._changed:
            if self._state == "running":
                self._state = "draining"
            return self._changed.wait_for(self._is_idle, timeout_seconds)

    def close(self) -> None:
        """Cancels what is under way and ends the engine's thread."""
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
        """What the engine is doing. Any thread may ask."""
        with self._changed:
            return EngineStats(
                slots=self._max_concurrent,
                running=sum(slot is not None for slot in self._slots),
                queued=len(self._queue),
                positions=self._positions,
                positions_in_use=self._regions.positions_in_use,
                requests=dict(self._requests),
                prompt_tokens=self._totals["prompt"],
                reused_tokens=self._totals["reused"],
                generated_tokens=self._totals["generated"],
                steps=self._totals["steps"],
                seconds_computing=self._seconds,
                compilations_since_start=num_compilations() - self._compilations_at_start,
            )

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _is_idle(self) -> bool:
        return not self._queue and not any(self._slots)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                started = time.perf_counter()
                self._admit()
                self._read_prompts()
                self._step()
                self._seconds += time.perf_counter() - started
            self._end_all("cancelled")
        except BaseException as error:
            self._end_all("error", f"The engine failed: {type(error).__name__}: {error}")
            raise

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._state == "closed" or not self._is_idle())
            return self._state != "closed"

    def _end_all(self, reason: str, error: str = "") -> None:
        with self._changed:
            self._state = "closed"
            left = [answer for answer in (*self._slots, *self._queue) if answer]
        for answer in left:
            answer.end(reason, error)
            self._release(answer)

    def _admit(self) -> None:
        """Gives slots and regions to those who have waited longest, and lets go of those who have gone."""
        with self._changed:
            gone = [answer for answer in (*self._slots, *self._queue) if answer and answer.handle.is_cancelled]
        for answer in gone:
            answer.end("cancelled")
            self._release(answer)
        while self._queue and None in self._slots:
            answer = self._queue[0]
            prompt = answer.request.prompt_ids
            with self._changed:  # `stats` looks at all of this.
                room = self._regions.allocate(len(prompt) + answer.request.max_new_tokens, prompt[:-1], answer.adapter)
                if room is None:
                    return
                self._queue.popleft()
                answer.slot = self._slots.index(None)
                self._slots[answer.slot] = answer
                self._totals["prompt"] += len(prompt)
            answer.region, source, answer.num_read = room
            if source is not None:
                self._programs.copy(source.start, answer.region.start, answer.num_read // PREFILL_CHUNK)
                self._totals["reused"] += answer.num_read
            if answer.request.sampling.repetition_penalty != 1:
                self._programs.mark_seen(answer.slot, prompt)

    def _read_prompts(self) -> None:
        budget = _PROMPT_TOKENS_A_STEP
        for answer in filter(None, list(self._slots)):
            prompt, region = answer.request.prompt_ids, answer.region
            while region is not None and not answer.is_read and budget > 0:
                piece = prompt[answer.num_read : min(answer.num_read + PREFILL_CHUNK, len(prompt) - 1)]
                self._programs.prefill(piece, region.start, answer.num_read, answer.adapter)
                answer.num_read += len(piece)
                if len(piece) == PREFILL_CHUNK:
                    region.tokens = tuple(prompt[: answer.num_read])
                budget -= len(piece)

    def _step(self) -> None:
        """Makes one token of each answer whose prompt has been read."""
        answers = [answer for answer in self._slots if answer is not None and answer.is_read]
        if not answers:
            return
        made = self._programs.decode(self._rows(answers))
        likeliest = made.logprobs.top_ids.tolist(), made.logprobs.top.tolist()
        with self._changed:
            self._totals["steps"] += 1
            self._totals["generated"] += len(answers)
        for index, answer in enumerate(answers):
            if not made.are_finite[index]:
                answer.end("error", "The model's logits are no numbers.")
            else:
                answer.take(int(made.tokens[index]), made.logprobs.chosen[index], *(each[index] for each in likeliest))
            if answer.finish_reason:
                self._release(answer)

    def _rows(self, answers: list[Answer]) -> DecodeBatch:
        rows = self._programs.empty_batch(next(count for count in self._row_counts if count >= len(answers)))
        for index, answer in enumerate(answers):
            request = answer.request
            assert answer.region is not None
            rows.tokens[index], rows.positions[index] = answer.last_token, answer.position
            rows.starts[index], rows.slots[index] = answer.region.start, answer.slot
            rows.adapters[index], rows.wants_logprobs[index] = answer.adapter, request.num_logprobs > 0
            for name, value in request.sampling._asdict().items():
                getattr(rows.sampling, name)[index] = value
            rows.sampling.seed[index] = np.uint32(request.seed & 0xFFFFFFFF)
            rows.sampling.index[index] = answer.num_made
        return rows

    def _release(self, answer: Answer) -> None:
        with self._changed:
            self._requests[answer.finish_reason] += 1
            if answer.region is not None:
                self._regions.free(answer.region)
                answer.region = None
                self._slots[answer.slot] = None
            else:
                self._queue.remove(answer)
            self._changed.notify_all()


def _row_counts(most: int) -> tuple[int, ...]:
    """One, four, and its doubles, up to the most there can be: two rows take about as long as four."""
    counts = [1]
    while counts[-1] < most:
        counts.append(min(max(2 * counts[-1], 4), most))
    return tuple(counts)
