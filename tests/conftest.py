"""Fixtures. Everything runs on CPU with tiny models; nothing reads the network or the user's caches."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest

FAMILIES = ("gemma", "gemma2", "gemma3", "gemma4")
# Files that take minutes begin first: else one process ends with them, and the others wait.
LONGEST_FILES = ("test_mesh.py", "test_processes.py", "test_kills.py", "test_benchmarks.py", "test_litert.py")


def pytest_collection_modifyitems(items):
    """Sorts by file, the longest ones first; within a file nothing changes."""
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Keeps what a test run caches out of the user's cache, except for the demo model's file, which is large."""
    if "GEMMA_TUNE_CACHE" not in os.environ:
        os.environ["GEMMA_TUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


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
    params=["gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma", "gemma2", "gemma4"))]
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
