"""Settings of malloc that a step's time depends on, each in a process of its own."""

import subprocess
import sys

import pytest

# A program with 128 MB of temporary memory: twice what glibc takes without asking the operating system anew.
PROGRAM = """
import resource, sys
from gemma_tune.runtime.backend import jax
from gemma_tune.runtime.process_memory import keep_freed_memory
import jax.numpy as jnp

program = jax.jit(lambda x: jnp.tanh(x @ jnp.ones((64, 4096))) @ jnp.ones((4096, 64)))
x = jnp.ones((8192, 64))
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(8):
    program(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    program(x).block_until_ready()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults, program.lower(x).compile().memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.slow
def test_freed_memory_is_kept():
    """Pages that are mapped anew show as faults; without the setting they come with every call."""
    faults = {}
    for setting in ("keep", "default"):
        found = subprocess.run([sys.executable, "-c", PROGRAM, setting], capture_output=True, text=True, check=True)
        faults[setting], temporary_bytes = map(int, found.stdout.split())
    assert temporary_bytes > 64 << 20
    every_time = 8 * temporary_bytes // 4096
    # The heap may still grow once, when something small stands in the way.
    assert faults["default"] >= every_time and faults["keep"] <= every_time // 4, faults
