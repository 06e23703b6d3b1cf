"""Equal models have exports that are equal byte for byte, whichever process writes them."""

import subprocess
import sys

from helpers import write_exports
from helpers.lora import with_lora

from gemma_tune.models.lora.adapter import save_adapter


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_write_the_same_bytes(tiny, rng, tmp_path):
    adapter = tmp_path / "adapter"
    save_adapter(with_lora(tiny(), rng, {}), adapter, base_model="tiny")
    write_exports.write_exports(tmp_path / "ours", adapter)
    subprocess.run([sys.executable, write_exports.__file__, str(tmp_path / "theirs"), str(adapter)], check=True)
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert {name.split("/")[0] for name in ours} == set(write_exports.OPTIONS) and ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
