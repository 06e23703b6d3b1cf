"""Every recipe in configs/ resolves, and names a model that exists."""

from pathlib import Path

import pytest

from gemma_tune.cli.config_resolution import load_config_file
from gemma_tune.config import Config
from gemma_tune.models.sources.source import parse_source

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def test_there_are_recipes():
    assert {path.stem for path in CONFIGS} >= {"tiny", "gemma2_2b", "gemma3_270m", "gemma3_1b", "gemma3_4b"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_resolves(path):
    config = load_config_file(str(path))
    assert isinstance(config, Config)
    parse_source(config.model.source)
    assert config.workdir == f"runs/{path.stem}"
    assert path.name in path.read_text(), "its docstring says how to run it"
