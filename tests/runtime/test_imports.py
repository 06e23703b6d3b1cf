"""Packages are hidden while another is imported, and there again afterwards."""

import importlib
import sys

import pytest

from gemma_tune.runtime.imports import hide_packages


def test_hidden_packages_come_back(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(ImportError), hide_packages("colorsys"):
        importlib.import_module("colorsys")
    assert importlib.import_module("colorsys").rgb_to_hsv(0, 0, 0) == (0.0, 0.0, 0)


def test_what_was_imported_before_stays():
    with hide_packages("json"):
        assert importlib.import_module("json") is sys.modules["json"]
