"""JAX keeps compiled programs where the user wants them, and those that the user wants."""

import os
import subprocess
import sys

import pytest

from gemma_tune.runtime.backend import cache_dir, cache_problem, enable_compilation_cache, jax

DIRECTORY, SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def fresh():
    """Sets JAX's settings as they are without gemma_tune; afterwards they are as before."""
    before = {name: getattr(jax.config, name) for name in (DIRECTORY, SECONDS)}
    jax.config.update(DIRECTORY, None)
    jax.config.update(SECONDS, 1.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_cache_is_where_the_variable_says_when_it_is_enabled(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("GEMMA_TUNE_CACHE", str(tmp_path / "ours"))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    enable_compilation_cache()
    assert getattr(jax.config, DIRECTORY).startswith(f"{tmp_path}/ours/xla-") and getattr(jax.config, SECONDS) == 0.5
    monkeypatch.delenv("GEMMA_TUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "gemma_tune"


def test_settings_of_jax_win(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    enable_compilation_cache()
    assert getattr(jax.config, SECONDS) == 1.0
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    jax.config.update(DIRECTORY, None)
    jax.config.update(SECONDS, 0.0)  # As the user's program, or the variable when JAX was imported.
    enable_compilation_cache()
    assert getattr(jax.config, SECONDS) == 0.0
    jax.config.update(DIRECTORY, str(tmp_path / "theirs"))
    enable_compilation_cache()
    assert getattr(jax.config, DIRECTORY) == str(tmp_path / "theirs")


def test_without_a_cache_folder_one_line_says_so(tmp_path):
    """A home under a file can be written by nobody, root included. Nothing else complains about it, Matplotlib neither."""
    (tmp_path / "file").touch()
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GEMMA_TUNE_CACHE", "XDG_CACHE_HOME")
    }
    code = "import gemma_tune.runtime.backend as b, matplotlib; matplotlib.get_configdir(); print(b.jax.config.jax_compilation_cache_dir)"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env={**environment, "HOME": str(tmp_path / "file")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "None" and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"The cache folder {tmp_path}/file/.cache/gemma_tune can't be written" in done.stderr
    assert "Set GEMMA_TUNE_CACHE to another folder." in done.stderr


def test_a_tilde_in_the_variable_is_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GEMMA_TUNE_CACHE", "~/kept")
    assert cache_dir() == tmp_path / "kept" and cache_problem() == "" and (tmp_path / "kept").is_dir()
