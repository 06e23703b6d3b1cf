"""Tests that need eight devices: a CPU that counts as eight. `tests/test_mesh.py` runs them in a process of its own:

XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest --numprocesses=0 tests/mesh
"""

import os

DEVICES = "--xla_force_host_platform_device_count=8"
collect_ignore_glob = [] if DEVICES in os.environ.get("XLA_FLAGS", "") else ["test_*.py"]
