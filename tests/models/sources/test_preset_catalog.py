"""The preset list against what KerasHub registers."""

from pathlib import Path

import pytest

from gemma_tune.errors import ModelError
from gemma_tune.models.sources.preset_catalog import preset_names, presets
from gemma_tune.models.sources.source import parse_source, source_of_folder
from gemma_tune.runtime.backend import keras_hub


def test_it_lists_what_keras_hub_registers():
    classes = (keras_hub.models.GemmaCausalLM, keras_hub.models.Gemma3CausalLM, keras_hub.models.Gemma4CausalLM)
    registered = {name for cls in classes for name in cls.presets}
    left_out = registered - set(preset_names())
    assert set(preset_names()) <= registered
    assert all("embedding" in name or "assistant" in name for name in left_out), left_out


@pytest.mark.parametrize(
    ("name", "family", "is_multimodal", "is_instruct", "context"),
    [
        ("gemma_2b_en", "gemma", False, False, 8192),
        ("gemma2_instruct_9b_en", "gemma2", False, True, 8192),
        ("gemma3_270m", "gemma3", False, False, 32768),
        ("gemma3_instruct_4b", "gemma3", True, True, 131072),
        ("gemma3_instruct_4b_text", "gemma3", False, True, 131072),
        ("gemma4_31b", "gemma4", True, False, 262144),
    ],
)
def test_what_is_said_of_a_preset(name, family, is_multimodal, is_instruct, context):
    (preset,) = [preset for preset in presets() if preset.name == name]
    assert (preset.family, preset.is_multimodal, preset.is_instruct, preset.context_tokens) == (
        family,
        is_multimodal,
        is_instruct,
        context,
    )
    assert preset.num_params > 1e8 and preset.handle.startswith("kaggle://")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma3_1bb", r"There is no model 'gemma3_1bb'. Did you mean gemma3_1b"),
        ("dmo", r"There is no model 'dmo'. Did you mean demo\?"),
        ("gs://bucket/x", r"models are downloaded from kaggle:// and hf:// only"),
        ("nowhere.gguf", r"There is no file nowhere.gguf"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ModelError, match=message):
        parse_source(name)


def test_folders_with_names_of_models(tmp_path, monkeypatch):
    """A printed path means the folder, also where the folder has the name of a model."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "tiny", "tiny:gemma2", "gemma3_270m", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"class_name": "X"}')
        assert parse_source(source_of_folder(Path(name))).kind == "keras"
    assert parse_source("demo").kind == "demo" and parse_source("tiny").kind == "tiny"
    assert source_of_folder(Path("mine")) == "mine" and source_of_folder(tmp_path / "demo") == f"{tmp_path}/demo"


def test_directories(write, tmp_path):
    for name, content, kind in (
        ("hf", '{"model_type": "gemma"}', "hf"),
        ("k", '{"class_name": "X"}', "keras"),
        ("r", '{"workdir": "", "training": {}}', "run"),
    ):
        write(f"{name}/config.json", content)
        assert parse_source(str(tmp_path / name)).kind == kind
    write("empty/x", "")
    with pytest.raises(ModelError, match=r"empty holds no model: config.json is missing"):
        parse_source(str(tmp_path / "empty"))
    write("odd/config.json", "{}")
    with pytest.raises(ModelError, match="describes neither a Keras preset"):
        parse_source(str(tmp_path / "odd"))
    write("bad/config.json", "{")
    with pytest.raises(ModelError, match="can't be read as JSON"):
        parse_source(str(tmp_path / "bad"))
