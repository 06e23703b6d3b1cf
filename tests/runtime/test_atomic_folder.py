"""A folder appears whole or not at all, whatever happens while it is written."""

import os
import signal
import subprocess
import sys

import pytest

from gemma_tune.errors import DataError, ModelError
from gemma_tune.runtime import atomic_folder as module
from gemma_tune.runtime.atomic_files import CHECKSUMS, disk_errors_as, find_damage
from gemma_tune.runtime.atomic_folder import atomic_folder, check_disk_space, check_output

MARKER = "export.json"

KILLED = """
import os, signal, sys
from pathlib import Path
from gemma_tune.runtime import atomic_folder as module
path = Path(sys.argv[1])
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "replacing":
    replace = os.replace
    module.os.replace = lambda a, b: kill() if Path(b) == path else replace(a, b)
with module.atomic_folder(path, replace=True) as folder:
    (folder / "half").write_text("…")
    if sys.argv[2] == "writing":
        kill()
"""


def write(path, name="file"):
    with atomic_folder(path, replace=True) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / name).write_text("text")
        (folder / MARKER).write_text("{}")


def names(path):
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*"))


def kill_while(path, when):
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), when], check=False)
    assert done.returncode == -signal.SIGKILL


def test_it_is_there_at_the_end_and_nothing_else(tmp_path):
    write(tmp_path / "a" / "b")
    assert names(tmp_path) == ["a", "a/b", "a/b/deep", "a/b/deep/file", f"a/b/{MARKER}"]


def test_kill_9_leaves_no_output_and_the_next_one_clears_up(tmp_path):
    kill_while(tmp_path / "out", "writing")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    write(tmp_path / "out")
    assert names(tmp_path) == ["out", "out/deep", "out/deep/file", f"out/{MARKER}"]


@pytest.mark.parametrize("when", ["writing", "replacing"])
def test_kill_9_keeps_what_was_to_be_replaced(tmp_path, when):
    """At worst, between the two renames, the old one waits in the partial folder until somebody writes there again."""
    write(tmp_path / "out", "old")
    kill_while(tmp_path / "out", when)
    assert (tmp_path / "out" / "deep" / "old").exists() == (when == "writing")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out"):
        raise RuntimeError
    assert names(tmp_path) == ["out", "out/deep", "out/deep/old", f"out/{MARKER}"]


def test_a_failure_leaves_what_was_there(tmp_path):
    write(tmp_path / "out", "old")
    with (
        pytest.raises(OSError, match="No space left on device"),
        atomic_folder(tmp_path / "out", replace=True) as folder,
    ):
        (folder / "half").write_text("…")
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == ["out", "out/deep", "out/deep/old", f"out/{MARKER}"]
    write(tmp_path / "out", "new")
    assert names(tmp_path) == ["out", "out/deep", "out/deep/new", f"out/{MARKER}"]


def test_files_are_on_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(module.os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(module.os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    write(tmp_path / "out")
    before = events[: events.index("replace")]
    assert {"file", "deep", MARKER, "new"} == {name.rsplit("/", 1)[-1] for name in before}
    assert events[-1] == str(tmp_path)


def test_two_at_once_are_refused(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("first")
        with pytest.raises(BlockingIOError, match="another process is writing"), atomic_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "file").read_text() == "first"


def test_without_replace_what_is_there_stays(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("…")
    assert names(tmp_path) == ["out", "out/deep", "out/deep/old", f"out/{MARKER}"]
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("…")
    assert names(tmp_path / "empty") == ["file"]


def test_several_writers_where_that_is_allowed(tmp_path):
    """As in a cache: the first to be done gives its folder the name, and nothing of the others stays."""
    with pytest.raises(OSError), atomic_folder(tmp_path / "out", exclusive=False) as late:
        with atomic_folder(tmp_path / "out", exclusive=False) as early:
            (early / "early").write_text("…")
        (late / "late").write_text("…")
    assert names(tmp_path) == ["out", "out/early"]


def test_checksums_tell_of_damage(tmp_path):
    with atomic_folder(tmp_path / "out", checksums=True) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("text")
    assert names(tmp_path / "out") == [CHECKSUMS, "deep", "deep/file"] and find_damage(tmp_path / "out") == ""
    (tmp_path / "out" / "deep" / "file").write_text("next")
    assert "holds other bytes than were written" in find_damage(tmp_path / "out")


def test_permissions_are_as_asked(tmp_path):
    for name, exclusive, mode in (("ours", True, 0o777), ("mine", False, 0o700)):
        with atomic_folder(tmp_path / name, exclusive=exclusive, mode=mode):
            pass
        (tmp_path / "plain").mkdir(mode, exist_ok=True)
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode
        (tmp_path / "plain").rmdir()


def test_disk_errors_become_the_errors_of_the_caller(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DataError, match=r"The cache can't be written: Not a directory: .*file.*\. Name another\."),
        disk_errors_as(DataError, "The cache", "Name another."),
        atomic_folder(tmp_path / "file" / "out"),
    ):
        pass
    with pytest.raises(ModelError, match=r"^out can't be written: 1\.$"), disk_errors_as(ModelError, "out"):
        raise OSError(1)


def test_only_exports_are_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    assert check_output(tmp_path / "mine") == tmp_path / "mine"  # Empty.
    (tmp_path / "mine" / "thesis.txt").write_text("…")
    with pytest.raises(ModelError, match="exists already"):
        check_output(tmp_path / "mine")
    with pytest.raises(ModelError, match="is no export of gemma_tune"):
        check_output(tmp_path / "mine", True, MARKER)
    write(tmp_path / "out")
    assert check_output(tmp_path / "out", True, MARKER) == tmp_path / "out"
    (tmp_path / "file").write_text("")
    for overwrite in (False, True):
        with pytest.raises(ModelError):
            check_output(tmp_path / "file", overwrite, MARKER)


def test_a_disk_too_small_is_said(tmp_path):
    check_disk_space(tmp_path / "not" / "there", 1)
    with pytest.raises(ModelError, match=r"needs about 1,000,000\.00 GB, and the disk has"):
        check_disk_space(tmp_path / "not" / "there", 10**15)
