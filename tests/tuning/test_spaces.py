"""Spaces from YAML, their order, their conditions and what a trial's Config becomes."""

import pytest

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError
from gemma_tune.tuning.budget import parse_budget
from gemma_tune.tuning.spaces.default_spaces import default_space
from gemma_tune.tuning.spaces.read_space import parse_space, read_space
from gemma_tune.tuning.spaces.space import apply_values

YAML = """
lora_rank: [4, 8]
optimizer.learning_rate: {low: 1e-5, high: 1e-2, log: true}
training.num_epochs: {low: 2, high: 7, step: 2}
lora.target_layers: [attention, "query,value", [key, value]]
lora.alpha: {choices: [8, 16.0], when: {lora.use_rslora: true}}
lora.use_rslora: [true, false]
"""


def test_a_space_is_read_as_it_is_meant(tmp_path):
    (tmp_path / "space.yaml").write_text(YAML)
    space = read_space(tmp_path / "space.yaml", {"lora_rank": "lora.rank"})
    settings = {setting.path: setting for setting in space.settings}
    assert settings["lora.rank"].choices == (4, 8)
    assert settings["optimizer.learning_rate"].extremes == (1e-5, 1e-2) and settings["optimizer.learning_rate"].log
    assert settings["training.num_epochs"].extremes == (2, 6)  # 7 is no step.
    assert settings["lora.target_layers"].choices == ("attention", "query,value", "key,value")
    assert settings["lora.alpha"].choices == (8.0, 16.0)
    paths = [setting.path for setting in space.settings]
    assert paths.index("lora.use_rslora") < paths.index("lora.alpha")  # Conditions come first.


def test_conditions_decide_what_a_trial_takes_over():
    space = parse_space(
        {"lora.use_rslora": [True, False], "lora.alpha": {"choices": [9.0], "when": {"lora.use_rslora": True}}}
    )
    values = {"lora.use_rslora": True, "lora.alpha": 9.0}
    assert apply_values(space, Config(), values).lora.alpha == 9.0
    assert apply_values(space, Config(), values | {"lora.use_rslora": False}).lora.alpha == Config().lora.alpha
    with pytest.raises(ConfigError, match="depend on each other"):
        parse_space({
            "lora.rank": {"choices": [4], "when": {"lora.alpha": 1.0}},
            "lora.alpha": {"choices": [1.0], "when": {"lora.rank": 4}},
        })  # fmt: skip


def test_the_first_trial_stays_in_the_space():
    space = parse_space({"optimizer.learning_rate": {"low": 1e-3, "high": 1e-2}, "lora.rank": [8, 16]})
    base = Config()
    assert space.first_values(base) == {"optimizer.learning_rate": 1e-3, "lora.rank": 4}
    assert space.including(base).settings[1].choices == (4, 8, 16)  # So that the defaults are one of the choices.


@pytest.mark.parametrize(
    "settings",
    [{}, {"training.method": "full"}, {"training.method": "qlora"}, {"training.qat": "int8"}, {"lora.use_dora": True}],
)
def test_each_method_has_a_default_space_of_valid_settings(settings):
    base = Config().replace(settings)
    space = default_space(base).including(base)
    space.check(base)
    paths = {setting.path for setting in space.settings}
    assert "optimizer.learning_rate" in paths
    assert ("lora.rank" in paths) == (base.training.method != "full")


@pytest.mark.parametrize(
    "text, num_trials, seconds",
    [("30_trials", 30, 0), ("1 trial", 1, 0), ("2h", 0, 7200), ("90m", 0, 5400), ("1h30m", 0, 5400), ("1.5h", 0, 5400)],
)
def test_budgets(text, num_trials, seconds):
    assert parse_budget(text) == (num_trials, seconds)
