"""Meshes of devices: how they are written; and what runs on eight of them, in a process that has as many."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError
from gemma_tune.mesh import MeshShape, fitting_mesh, parse_mesh

FOLDER = Path(__file__).parent / "mesh"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "marks",
    [pytest.param("not nightly", marks=pytest.mark.slow), pytest.param("nightly", marks=pytest.mark.nightly)],
)
def test_on_eight_devices(marks):
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-m", "pytest", "-m", marks, "--numprocesses=0", "--timeout=1200", str(FOLDER)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout[-6000:])
    assert done.returncode == 0 and re.search(r"\d+ passed", done.stdout)


def test_written_and_read():
    assert parse_mesh("data:2,fsdp:4,model:8") == (2, 4, 8) and parse_mesh(" fsdp:3") == (1, 3, 1)
    for shape in (MeshShape(2, 1, 4), MeshShape(1, 3, 1), MeshShape()):
        assert parse_mesh(str(shape)) == shape
    assert MeshShape(2, 3, 4).num_devices == 24 and MeshShape(2, 3, 4).num_row_shards == 6


@pytest.mark.parametrize("num_devices", range(1, 17))
@pytest.mark.parametrize("num_rows", range(1, 9))
def test_auto_takes_all_devices_and_cuts_the_rows_evenly(num_devices, num_rows):
    shape = fitting_mesh(num_devices, num_rows)
    assert shape.num_devices == num_devices and num_rows % shape.num_row_shards == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("fdsp:2", "there is no axis 'fdsp'. Did you mean fsdp?"),
        ("autp", "there is no axis 'autp'. Did you mean auto?"),
        ("data", "'data' gives no size to data"),
        ("data:0", "'data:0' gives no size"),
        ("data:-2", "'data:-2' gives no size"),
        ("data:2,data:2", "'data:2' gives no size"),
        ("data:2,", "there is no axis ''"),
    ],
)
def test_written_wrongly(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config().replace({"training.mesh": text})


def test_rows_that_cannot_be_cut():
    with pytest.raises(ConfigError, match="into 8 parts, so training.batch_size must be a multiple of that; got 4"):
        Config().replace({"training.mesh": "data:4,fsdp:2"})
    changes = {"training.mesh": "fsdp:4", "training.batch_size": 8, "training.grad_accum_steps": 4}
    with pytest.raises(ConfigError, match=r"training.batch_size / training.grad_accum_steps must .* got 2"):
        Config().replace(changes)
    with pytest.raises(ConfigError, match="needs training.program=whole or auto, got per_block"):
        Config().replace({"training.mesh": "auto", "training.program": "per_block"})


def test_more_devices_than_there_are():
    from gemma_tune.errors import ModelError
    from gemma_tune.models.sharding.placement import make_mesh_sharding

    with pytest.raises(ModelError, match=r"training.mesh=data:64 needs 64 devices, but this run has \d"):
        make_mesh_sharding("data:64", 64)
