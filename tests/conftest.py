"""Fixtures. Everything runs on CPU with tiny models; nothing reads the network or the user's caches."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# All processes of a test run share the programs that any of them compiled, small ones too: most of the time of tests of
# tiny models is compiling. The variables are set before anything imports gemma_tune, and child processes inherit them.
_own_cache = "" if "GEMMA_TUNE_CACHE" in os.environ else tempfile.mkdtemp(prefix="gemma_tune-tests-")
os.environ.setdefault("GEMMA_TUNE_CACHE", _own_cache)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# LLVM's optimizations take a third of the time to compile, of programs that run once. XLA's own, which decide what is
# computed and what is held, stay on. `benchmarks/` measures with all of them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # As in background jobs of a shell; children would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

FAMILIES = ("gemma", "gemma2", "gemma3", "gemma4")
# Files whose tests take longest begin first, so that no process is left with one of them at the end.
LONGEST_FILES = ("test_mesh.py", "test_processes.py", "test_kills.py", "test_benchmarks.py", "test_litert.py")
TIERS = Path(__file__).with_name("tiers.txt")


def tiers():
    """Returns node ID, with or without parameters -> `slow` or `nightly`."""
    lines = [line for line in TIERS.read_text().splitlines() if line and not line.startswith("#")]
    return {node_id: tier for tier, node_id in (line.split(maxsplit=1) for line in lines)}


@pytest.hookimpl(tryfirst=True)  # Before `-m` selects by the marks.
def pytest_collection_modifyitems(config, items):
    """Marks the tests of tiers.txt, and sorts by file, the longest ones first; within a file nothing changes."""
    places, tier_of = {name: place for place, name in enumerate(LONGEST_FILES)}, tiers()
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    for item in items:
        tier = tier_of.get(item.nodeid) or tier_of.get(item.nodeid.partition("[")[0])
        if tier:
            item.add_marker(tier)
    if not any("::" in argument for argument in config.args):
        files = {item.nodeid.partition("::")[0] for item in items}
        node_ids = {item.nodeid for item in items} | {item.nodeid.partition("[")[0] for item in items}
        unknown = [node_id for node_id in tier_of if node_id.partition("::")[0] in files and node_id not in node_ids]
        if unknown:
            raise pytest.UsageError(f"tests/tiers.txt names tests that don't exist: {', '.join(unknown)}.")


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
