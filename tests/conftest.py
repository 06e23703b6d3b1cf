"""Fixtures. Everything runs on CPU with tiny models; nothing reads the network or the user's caches."""

import os
import shutil
import tempfile

import numpy as np
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# All processes of a test run share the programs that any of them compiled, small ones too: most of the time of tests of
# tiny models is compiling. The variables are set before anything imports gemma_tune, and child processes inherit them.
_own_cache = "" if "GEMMA_TUNE_CACHE" in os.environ else tempfile.mkdtemp(prefix="gemma_tune-tests-")
os.environ.setdefault("GEMMA_TUNE_CACHE", _own_cache)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

FAMILIES = ("gemma", "gemma2", "gemma3", "gemma4")
# Files whose tests take longest begin first, so that no process is left with one of them at the end.
LONGEST_FILES = ("test_mesh.py", "test_processes.py", "test_kills.py", "test_benchmarks.py", "test_litert.py")


def pytest_collection_modifyitems(items):
    """Sorts by file, the longest ones first; within a file nothing changes."""
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_unconfigure(config):
    """Removes the cache of this test run, in the process that made it."""
    if _own_cache and not hasattr(config, "workerinput"):
        shutil.rmtree(_own_cache, ignore_errors=True)


@pytest.fixture
def rng(request):
    """A random generator whose seed is printed when the test fails."""
    seed = 20240731
    request.node.user_properties.append(("seed", seed))
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(params=FAMILIES)
def family(request):
    """Each family in turn."""
    return request.param


@pytest.fixture(
    params=["gemma3", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("gemma", "gemma2", "gemma4"))]
)
def some_family(request):
    """Gemma 3 always, the others among the tests that take minutes."""
    return request.param


@pytest.fixture
def tiny():
    """Loads a tiny model: `tiny("gemma2")`. A new one each time, since tests change them."""

    def load(family="gemma3", **arguments):
        from gemma_tune.models.load import load_model

        return load_model(f"tiny:{family}", **arguments)

    return load


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from gemma_tune.models.load import load_tokenizer

    return load_tokenizer("tiny")[0]


@pytest.fixture
def write(tmp_path):
    """Writes a file: `write("a.jsonl", "text or bytes")` returns its path."""

    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file
