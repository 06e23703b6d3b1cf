"""Chooses which requests of an engine run, and advances their answers step by step."""

import collections
import threading
import time

import numpy as np

from gemma_tune.errors import EngineFull
from gemma_tune.serving.engine.answer import Answer
from gemma_tune.serving.engine.kv_cache import KVCacheAllocator
from gemma_tune.serving.engine.programs import PREFILL_CHUNK, DecodeBatch, Programs
from gemma_tune.serving.engine.stats import EngineStats
from gemma_tune.serving.grammar.constraints import write_allowed
from gemma_tune.serving.logit_changes import NO_CHANGES, set_row

# Prompt tokens that are prefilled between two decode steps: a long prompt delays the running answers so much at most.
_PREFILL_BUDGET = 4 * PREFILL_CHUNK


class Scheduler:
    """The queue, the running answers, and their slots of the KV cache.

    `advance` and `end_all` are for the engine's thread alone; what other threads read changes under the lock.

    Args:
        programs: Compiled programs, which hold the cache.
        num_positions: Size of the cache, in positions.
        max_concurrent: Answers that run at once.
        max_queued: Answers that may wait.
        changed: Condition with the engine's lock. It is notified when an answer ends.

    Attributes:
        batch_sizes: Numbers of rows that a decode step may have.
    """

    def __init__(
        self, programs: Programs, num_positions: int, max_concurrent: int, max_queued: int, changed: threading.Condition
    ):
        self._programs, self._num_positions, self._max_queued = programs, num_positions, max_queued
        self._changed = changed
        self._allocator = KVCacheAllocator(num_positions, PREFILL_CHUNK)
        self._queue: collections.deque[Answer] = collections.deque()
        self._running: list[Answer | None] = [None] * max_concurrent  # By their rows in the table of seen tokens.
        self.batch_sizes = _batch_sizes(max_concurrent)
        self._finish_reasons: collections.Counter[str] = collections.Counter()
        self._totals: collections.Counter[str] = collections.Counter()
        self._computing_seconds = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to answer. The caller holds the lock."""
        return not self._queue and not any(self._running)

    def stats(self, compilations_since_start: int) -> EngineStats:
        """Returns what is being done and has been done."""
        with self._changed:
            return EngineStats(
                max_running=len(self._running),
                running=len(self._running) - self._running.count(None),
                queued=len(self._queue),
                cache_positions=self._num_positions,
                cache_positions_in_use=self._allocator.positions_in_use,
                finish_reasons=dict(self._finish_reasons),
                prompt_tokens=self._totals["prompt"],
                reused_tokens=self._totals["reused"],
                generated_tokens=self._totals["generated"],
                decode_steps=self._totals["steps"],
                computing_seconds=self._computing_seconds,
                compilations_since_start=compilations_since_start,
            )

    def enqueue(self, answer: Answer) -> None:
        """Appends an answer to the queue. The caller holds the lock.

        Raises:
            EngineFull: The queue is full. Answers that the next step can admit don't count.
        """
        if len(self._queue) - self._running.count(None) >= self._max_queued:
            raise EngineFull(f"The request queue is full (max_queued={self._max_queued}).")
        self._queue.append(answer)

    def advance(self) -> None:
        """Admits waiting answers, prefills prompts, and adds a token to each answer whose prompt is in the cache."""
        started = time.perf_counter()
        self._end_cancelled()
        self._admit()
        self._prefill()
        self._decode()
        self._computing_seconds += time.perf_counter() - started

    def end_all(self, reason: str, error: str = "") -> None:
        """Ends all answers, running or queued. No new ones may be queued any more."""
        for answer in self._unfinished():
            answer.end(reason, error)
            self._release(answer)

    def _unfinished(self) -> list[Answer]:
        with self._changed:
            return [answer for answer in (*self._running, *self._queue) if answer]

    def _end_cancelled(self) -> None:
        for answer in self._unfinished():
            if answer.handle.is_cancelled:
                answer.end("cancelled")
                self._release(answer)

    def _admit(self) -> None:
        """Gives cache slots to the answers that have waited longest, as long as there is room."""
        while self._queue and None in self._running:
            answer = self._queue[0]
            prompt = answer.request.prompt_ids
            with self._changed:  # `stats` reads all of this.
                num_tokens = len(prompt) + answer.request.max_new_tokens
                allocation = self._allocator.allocate(num_tokens, prompt[:-1], answer.adapter)
                if allocation is None:
                    return
                self._queue.popleft()
                answer.seen_row = self._running.index(None)
                self._running[answer.seen_row] = answer
                self._totals["prompt"] += len(prompt)
            answer.cache_slot, source, answer.num_prefilled = allocation
            if source is not None:
                self._programs.copy(source.start, allocation.slot.start, allocation.num_reused // PREFILL_CHUNK)
                self._totals["reused"] += allocation.num_reused
            if answer.request.sampling.repetition_penalty != 1:
                self._programs.mark_seen(answer.seen_row, prompt)
            if answer.request.changes.has_penalties:
                self._programs.clear_counts(answer.seen_row)

    def _prefill(self) -> None:
        """Reads the next chunks of the prompts that aren't in the cache yet, up to the budget."""
        budget = _PREFILL_BUDGET
        for answer in filter(None, list(self._running)):
            prompt, slot = answer.request.prompt_ids, answer.cache_slot
            while slot is not None and not answer.is_prefilled and budget > 0:
                start = answer.num_prefilled
                chunk = prompt[start : min(start + PREFILL_CHUNK, len(prompt) - 1)]
                self._programs.prefill(chunk, slot.start, start, answer.adapter)
                answer.num_prefilled += len(chunk)
                if len(chunk) == PREFILL_CHUNK:
                    slot.tokens = tuple(prompt[: answer.num_prefilled])
                budget -= len(chunk)

    def _decode(self) -> None:
        """Adds one token to each answer whose prompt is in the cache."""
        answers = [answer for answer in self._running if answer is not None and answer.is_prefilled]
        if not answers:
            return
        output = self._programs.decode(self._batch(answers))
        top_ids, top_logprobs = output.logprobs.top_ids.tolist(), output.logprobs.top.tolist()
        with self._changed:
            self._totals["steps"] += 1
            self._totals["generated"] += len(answers)
        for row, answer in enumerate(answers):
            if not output.are_finite[row]:
                answer.end("error", "The model's logits are not finite.")
            elif answer.grammar is not None and answer.grammar.error:
                answer.end("error", f"The grammar can't be followed: {answer.grammar.error}")
            else:
                logprob = output.logprobs.chosen[row]
                answer.add_token(int(output.token_ids[row]), logprob, top_ids[row], top_logprobs[row])
            if answer.finish_reason:
                self._release(answer)

    def _batch(self, answers: list[Answer]) -> DecodeBatch:
        """Returns the inputs of a decode step, padded to the next batch size."""
        batch = self._programs.empty_batch(next(size for size in self.batch_sizes if size >= len(answers)))
        for row, answer in enumerate(answers):
            request = answer.request
            assert answer.cache_slot is not None
            batch.token_ids[row], batch.positions[row] = answer.last_token, answer.position
            batch.slot_starts[row], batch.seen_rows[row] = answer.cache_slot.start, answer.seen_row
            batch.adapters[row], batch.wants_logprobs[row] = answer.adapter, request.num_logprobs > 0
            for name, value in request.sampling._asdict().items():
                getattr(batch.sampling, name)[row] = value
            batch.sampling.seed[row] = np.uint32(request.seed & 0xFFFFFFFF)
            batch.sampling.index[row] = answer.num_generated
        return self._with_changes(batch, answers)

    def _with_changes(self, batch: DecodeBatch, answers: list[Answer]) -> DecodeBatch:
        """Returns a batch with what requests change in the logits. Most change nothing, and nothing is sent then."""
        if all(answer.request.changes == NO_CHANGES and answer.grammar is None for answer in answers):
            return batch
        changes = self._programs.empty_changes(len(batch.token_ids))
        for row, answer in enumerate(answers):
            set_row(changes, row, answer.request.changes)
            changes.is_constrained[row] = answer.grammar is not None
        write_allowed([(row, answer.grammar) for row, answer in enumerate(answers) if answer.grammar], changes.allowed)
        return batch._replace(changes=changes)

    def _release(self, answer: Answer) -> None:
        """Takes a finished answer out of the running ones or the queue, and frees its cache slot."""
        with self._changed:
            self._finish_reasons[answer.finish_reason] += 1
            if answer.cache_slot is not None:
                self._allocator.free(answer.cache_slot)
                answer.cache_slot = None
                self._running[answer.seen_row] = None
            else:
                self._queue.remove(answer)
            self._changed.notify_all()


def _batch_sizes(max_concurrent: int) -> tuple[int, ...]:
    """Returns 1, 4 and its doubles, up to the maximum: two rows take about as long as four."""
    sizes = [1]
    while sizes[-1] < max_concurrent:
        sizes.append(min(max(2 * sizes[-1], 4), max_concurrent))
    return tuple(sizes)
