"""A thousand requests of 32 clients, of which some leave midway and some send nonsense."""

import asyncio
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))


@pytest.mark.nightly
def test_a_thousand_requests_of_32_clients():
    """Every well-formed one gets the answer it gets alone; nothing is left of the others; memory stays."""
    from benchmarks.http_load import load
    from benchmarks.server import Server, shortfalls

    with Server("tiny", "--max_queued=32", "--max_length=512", "--feedback_db=") as server:
        figures = asyncio.run(load(server, num_requests=1000, num_clients=32, max_tokens=24, seed=0))
    assert shortfalls(figures) == []
    assert figures["num_requests"] == 1000
    assert figures["kinds"]["left"] > 30 and figures["kinds"]["malformed"] > 30


def test_what_falls_short_is_said():
    """The measure itself: a wrong answer, a slot that is kept and memory that grows are each found."""
    from benchmarks.server import shortfalls

    good = {
        "wrong": [],
        "slots_left": 0,
        "queued_left": 0,
        "compilations": 0.0,
        "memory_bytes": [100, 104, 104, 105, 106, 107, 106, 108],
    }
    assert shortfalls(good) == []
    assert "another answer" in shortfalls({**good, "wrong": [{"kind": "answered", "status": 200}]})[0]
    assert "1 slots" in shortfalls({**good, "slots_left": 1})[0]
    assert "2 programs" in shortfalls({**good, "compilations": 2.0})[0]
    assert "memory grew" in shortfalls({**good, "memory_bytes": [100, 101, 103, 105, 107, 109, 111, 113]})[0]
