"""Settings of malloc and JAX that hold for a process, each in a process of its own."""

import subprocess
import sys

import pytest

# A program with 128 MB of temporary memory: twice what glibc takes without asking the operating system anew.
PROGRAM = """
import resource, sys
from gemma_tune.runtime.process_memory import dedicate_process, keep_freed_memory
if "dedicated" in sys.argv[1:]:
    dedicate_process()
from gemma_tune.runtime.backend import jax
import jax.numpy as jnp

program = jax.jit(lambda x: jnp.tanh(x @ jnp.ones((64, 4096))) @ jnp.ones((4096, 64)))
x = jnp.ones((8192, 64))
if "keep" in sys.argv[1:]:
    keep_freed_memory()
for _ in range(8):
    program(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    program(x).block_until_ready()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults, program.lower(x).compile().memory_analysis().temp_size_in_bytes)
"""


SETTINGS = """
import sys
from gemma_tune import __main__
from gemma_tune.runtime.process_memory import dedicate_process, is_dedicated_process
if sys.argv[1] == "before":
    dedicate_process()
elif sys.argv[1] == "command line":
    sys.argv[1:] = ["--version"]
    try:
        __main__.main()
    except SystemExit:
        pass
from gemma_tune.runtime.backend import jax
if sys.argv[1] == "after":
    dedicate_process()
from jax._src import xla_bridge
print(is_dedicated_process(), xla_bridge._CPU_ENABLE_ASYNC_DISPATCH.value)
"""


def run(program, *arguments):
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    "when, dedicated", [("command line", True), ("before", True), ("after", True), ("never", False)]
)
def test_only_a_dedicated_process_gets_settings(when, dedicated):
    """A notebook's process, which never says so, keeps JAX's asynchronous dispatch."""
    assert run(SETTINGS, when) == [str(dedicated), str(not dedicated)]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.nightly
def test_freed_memory_is_kept():
    """Pages that are mapped anew show as faults; without the setting they come with every call."""
    faults = {}
    for setting in ("keep", "default"):
        faults[setting], temporary_bytes = map(int, run(PROGRAM, "dedicated", setting))
    assert temporary_bytes > 64 << 20
    every_time = 8 * temporary_bytes // 4096
    # The heap may still grow once, when a small allocation is in the way.
    assert faults["default"] >= every_time and faults["keep"] <= every_time // 4, faults
