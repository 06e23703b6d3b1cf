"""Settings that earlier versions saved are read in today's words; flags and config files take today's alone."""

import json

import pytest
from helpers.cli_arguments import FAST, TINY

from gemma_tune.cli.config_resolution import load_config_file
from gemma_tune.cli.main import run
from gemma_tune.config import Config
from gemma_tune.errors import ConfigError
from gemma_tune.saved_settings import with_current_values

# Setting -> the value that was saved, and the one that means the same today.
RENAMED = {
    "training.remat": ("blocks", "dots"),
    "training.program": ("blocks", "per_block"),
    "training.attention": ("blocks", "xla"),
}


def with_old_values(config):
    """Returns a Config as an earlier version would have saved it."""
    tree = config.to_dict()
    for path, (old, _) in RENAMED.items():
        group, name = path.split(".")
        tree[group][name] = old
    return tree


def test_renamed_values_are_translated():
    config = Config.from_saved(with_old_values(Config()))
    assert config == Config().replace({path: new for path, (_, new) in RENAMED.items()})


def test_todays_values_and_the_tree_that_was_read_stay():
    saved = Config().to_dict()
    assert with_current_values(saved) == saved
    old = with_old_values(Config())
    with_current_values(old)
    assert old == with_old_values(Config())


@pytest.mark.parametrize("tree", [{"training": 3}, {"training": {"remat": ["blocks"]}}, {"training": {"remat": 3}}])
def test_what_is_no_config_is_refused_as_such(tree):
    with pytest.raises(ConfigError, match="training"):
        Config.from_saved(tree)


@pytest.mark.parametrize("path", RENAMED)
def test_flags_and_config_files_refuse_old_values(path, write):
    old, new = RENAMED[path]
    message = f"{path} must be one of .*{new}.*; got 'blocks'"
    with pytest.raises(ConfigError, match=message):
        Config().replace({path: old})
    file = write(
        "c.py", f"from gemma_tune import Config\ndef get_config():\n    return Config().replace({{'{path}': '{old}'}})"
    )
    with pytest.raises(ConfigError, match=message):
        load_config_file(str(file))


def test_an_old_workdir_loads_and_resumes(tmp_path, capfd):
    """A run of which the config.json is an old one's: the same settings in today's words go on with it."""
    workdir = tmp_path / "w"
    settings = [f"--config.{path}={new}" for path, (_, new) in RENAMED.items()]
    command = ["train", *TINY, *FAST, *settings, f"--workdir={workdir}", "--config.training.num_train_steps=2"]
    assert run(command) == 0
    file = workdir / "config.json"
    file.write_text(json.dumps(with_old_values(Config.from_dict(json.loads(file.read_text())))))
    capfd.readouterr()
    assert run([*command, "--json"]) == 0
    captured = capfd.readouterr()
    assert "Resuming from the checkpoint of step 2" in captured.err and json.loads(captured.out)["num_steps"] == 2
    assert load_config_file(str(workdir)).training.remat == "dots"
    assert run(["eval", f"--model={workdir}", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["tuned"]
