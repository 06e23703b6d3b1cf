"""Batches come in order, errors come through, and the thread never outlives the loop."""

import threading
import time

import pytest

from gemma_tune.training.prefetch import DEPTH, Prefetch


class Batches:
    """Batch s is s; remembers which were made, by which thread."""

    def __init__(self, length, seconds=0.0, fail_at=None):
        self.length, self.seconds, self.fail_at, self.made, self.threads = length, seconds, fail_at, [], set()

    def __len__(self):
        return self.length

    def __getitem__(self, step):
        time.sleep(self.seconds)
        if step == self.fail_at:
            raise ValueError(f"batch {step} is damaged")
        self.made.append(step)
        self.threads.add(threading.current_thread().name)
        return step


def identity(batch):
    return batch


def is_running():
    return "prefetch" in {thread.name for thread in threading.enumerate()}


def wait_for(condition):
    deadline = time.monotonic() + 10  # Far longer than it takes; it ends as soon as it holds.
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


@pytest.mark.parametrize("first_step", [0, 3])
def test_each_step_gets_its_batch(first_step):
    batches = Batches(10)
    with Prefetch(batches, first_step, put=lambda batch: ("put", batch)) as ahead:
        assert [ahead.next() for _ in range(first_step, 10)] == [("put", step) for step in range(first_step, 10)]
    assert batches.threads == {"prefetch"} and not is_running()


def test_no_more_are_made_than_there_is_room_for():
    batches = Batches(100)
    with Prefetch(batches, 0, put=identity) as ahead:
        assert wait_for(lambda: len(batches.made) == DEPTH)
        time.sleep(0.05)
        assert len(batches.made) == DEPTH
        ahead.next()
        assert wait_for(lambda: len(batches.made) == DEPTH + 1)
    assert not is_running() and len(batches.made) == DEPTH + 1


def test_an_error_is_raised_where_its_batch_is_asked_for():
    with Prefetch(Batches(10, fail_at=2), 0, put=identity) as ahead:
        assert [ahead.next(), ahead.next()] == [0, 1]
        with pytest.raises(ValueError, match="batch 2 is damaged"):
            ahead.next()
    assert not is_running()


def test_asking_behind_the_last_batch_does_not_wait_for_ever():
    with Prefetch(Batches(1), 0, put=identity) as ahead:
        ahead.next()
        with pytest.raises(IndexError, match="has 1 steps"):
            ahead.next()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_when_the_loop_does(error):
    with pytest.raises(error), Prefetch(Batches(1000), 0, put=identity) as ahead:
        ahead.next()
        raise error
    assert not is_running()


def test_waiting_is_measured_and_is_little_when_steps_are_longer_than_batches():
    """Batches of 20 ms: with steps of 60 ms they are ready; with steps of no time each is waited for."""
    waits = {}
    for step_seconds in (0.06, 0.0):
        with Prefetch(Batches(8, seconds=0.02), 0, put=identity) as ahead:
            total = 0.0
            for step in range(8):
                ahead.next()
                total += ahead.wait_seconds if step else 0.0  # The first one is always waited for.
                time.sleep(step_seconds)
            waits[step_seconds] = total
    assert waits[0.0] > 0.06  # 7 batches of 20 ms less the one or two made ahead.
    assert waits[0.06] < waits[0.0] / 2


def test_the_default_puts_on_the_device():
    import jax
    import numpy as np

    with Prefetch([np.ones(3, np.float32)], 0) as ahead:
        assert isinstance(ahead.next(), jax.Array)
