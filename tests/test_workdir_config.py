"""Settings of a run, read from wherever one stands: relative paths still mean the files that they meant."""

import json
import shutil

import pytest

from gemma_tune.config import Config
from gemma_tune.errors import ModelError
from gemma_tune.models.sources.source import config_with_base
from gemma_tune.workdir_config import (
    PATH_SETTINGS,
    files_exist,
    missing_base,
    path_setting,
    paths_from,
    read_workdir_config,
    same_files,
    settings_to_save,
    with_full_paths,
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with data, a base and an adapter, in which one stands; returns a function that begins a run there."""
    folder = tmp_path / "my project"
    (folder / "data").mkdir(parents=True)
    (folder / "base").mkdir()
    (folder / "old.adapter.safetensors").write_text("")
    for name in ("a.jsonl", "b.jsonl", "held out.jsonl"):
        (folder / "data" / name).write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(folder)

    def begin(workdir="runs/first", source="base", data="data/a.jsonl", **others):
        settings = {"workdir": str(workdir), "model.source": source, "data.source": data}
        config = Config().replace(settings | {name.replace("__", "."): value for name, value in others.items()})
        place = folder / workdir
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(settings_to_save(config)))
        return place

    return begin


def paths(config):
    return {name: path_setting(config, name) for name in PATH_SETTINGS if path_setting(config, name)}


def test_where_it_was_begun_nothing_changes(project):
    run = project(model__adapter="old.adapter.safetensors", data__eval_source="data/held out.jsonl")
    config = read_workdir_config("runs/first")
    assert paths(config) == {
        "model.source": "base",
        "model.adapter": "old.adapter.safetensors",
        "data.source": "data/a.jsonl",
        "data.eval_source": "data/held out.jsonl",
    }
    assert json.loads((run / "config.json").read_text())["model"]["source"] == "base"  # As it was typed.


@pytest.mark.parametrize("workdir", ["runs/first", "absolute"])
def test_from_another_folder(project, tmp_path, monkeypatch, workdir):
    place = tmp_path / "runs of others" if workdir == "absolute" else workdir
    run = project(place, model__adapter="old.adapter.safetensors")
    monkeypatch.chdir(tmp_path / "elsewhere")
    root = tmp_path / "my project"
    assert paths(read_workdir_config(run)) == {
        "model.source": str(root / "base"),
        "model.adapter": str(root / "old.adapter.safetensors"),
        "data.source": str(root / "data/a.jsonl"),
    }


def test_moved_together(project, tmp_path, monkeypatch):
    """The copy's own files count, although the first ones are still there."""
    project()
    shutil.copytree(tmp_path / "my project", tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    found = paths(read_workdir_config("copy/runs/first"))
    assert found == {"model.source": str(tmp_path / "copy/base"), "data.source": str(tmp_path / "copy/data/a.jsonl")}


def test_beside_the_workdir(project, tmp_path, monkeypatch):
    """Files that were sent together with the run. A bare name could be a preset: only where it lay before."""
    run = project(source="models/base.gguf")
    shutil.rmtree(tmp_path / "my project/base")
    (tmp_path / "sent/models").mkdir(parents=True)
    (tmp_path / "sent/models/base.gguf").write_text("")
    shutil.move(run, tmp_path / "sent/first")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_workdir_config(tmp_path / "sent/first").model.source == str(tmp_path / "sent/models/base.gguf")


@pytest.mark.parametrize(
    "name", ["gemma3_270m", "tiny", "demo", "gemma_1.1_instruct_2b_en", "hf://me/mine", "tiny:gemma2"]
)
def test_names_of_models_are_no_paths(project, tmp_path, monkeypatch, name):
    """Also where a run beside this one has the name of a model."""
    run = project(source=name, data="sample:smartphone_support")
    (run.parent / name.replace("/", "_")).mkdir()
    for folder in (tmp_path / "my project", tmp_path / "elsewhere"):
        monkeypatch.chdir(folder)
        assert paths(read_workdir_config(run)) == {"model.source": name, "data.source": "sample:smartphone_support"}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("data/a.jsonl,data/b.jsonl", "{0}/data/a.jsonl,{0}/data/b.jsonl"),
        ("data/a.jsonl:0.7,data/b.jsonl:0.3", "{0}/data/a.jsonl:0.7,{0}/data/b.jsonl:0.3"),
        ("data/a.jsonl:2x", "{0}/data/a.jsonl:2x"),
        ("data/a.jsonl:.5,sample:x:.5", "{0}/data/a.jsonl:.5,sample:x:.5"),
        ("data/*.jsonl", "{0}/data/*.jsonl"),
        ("data", "{0}/data"),
        ("tfds:support_desk,x", "tfds:support_desk,x"),
        ("me/questions", "me/questions"),
        ("hf://datasets/me/questions", "hf://datasets/me/questions"),
        ("~/a.jsonl", "~/a.jsonl"),
        ("/somewhere/a.jsonl", "/somewhere/a.jsonl"),
    ],
)
def test_forms_of_data(project, tmp_path, monkeypatch, given, wanted):
    run = project(data=given)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_workdir_config(run).data.source == wanted.format(tmp_path / "my project")


def test_signs_of_globs_in_the_folder_are_meant_literally(tmp_path, monkeypatch):
    import glob

    folder = tmp_path / "v[1]"
    folder.mkdir()
    (folder / "a.jsonl").write_text("{}")
    monkeypatch.chdir(folder)
    (folder / "run").mkdir()
    config = Config().replace({"workdir": "run", "data.source": "*.jsonl"})
    (folder / "run/config.json").write_text(json.dumps(settings_to_save(config)))
    monkeypatch.chdir(tmp_path)
    assert glob.glob(read_workdir_config(folder / "run").data.source) == [str(folder / "a.jsonl")]


def test_a_run_of_an_older_version(project, tmp_path, monkeypatch):
    """It doesn't say where it was begun: its own relative workdir does."""
    run = project()
    saved = json.loads((run / "config.json").read_text())
    del saved["relative_to"]
    (run / "config.json").write_text(json.dumps(saved))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_workdir_config(run).data.source == str(tmp_path / "my project/data/a.jsonl")
    (run / "config.json").write_text(json.dumps({**saved, "workdir": str(run)}))
    (tmp_path / "elsewhere/data").mkdir()
    (tmp_path / "elsewhere/data/a.jsonl").write_text("{}")
    assert read_workdir_config(run).data.source == "data/a.jsonl"  # Nothing else says where: from here, as before.


def test_what_is_gone_is_said_with_its_whole_path(project, tmp_path, monkeypatch):
    run = project(data="data/gone.jsonl")
    shutil.rmtree(tmp_path / "my project/base")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_workdir_config(run).data.source == str(tmp_path / "my project/data/gone.jsonl")
    with pytest.raises(ModelError) as caught:
        config_with_base(run)
    message = str(caught.value)
    assert f"was {tmp_path}/my project/base. It isn't there any more" in message
    assert f"--model=FOLDER --adapter='{run}/adapter'" in message and str(missing_base(run)) == message


def test_resuming_from_elsewhere_keeps_the_paths(project, tmp_path, monkeypatch):
    """Else a run would depend on the folder in which it was last resumed, and couldn't be moved with its files."""
    run = project()
    before = json.loads((run / "config.json").read_text())
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = read_workdir_config(run).replace({"workdir": "../my project/runs/first", "training.keep_last": 7})
    after = settings_to_save(config, before, run)
    assert after == {**before, "training": {**before["training"], "keep_last": 7}}
    other = config.replace({"data.source": "../my project/data/b.jsonl"})
    assert settings_to_save(other, before, run)["relative_to"] == str(tmp_path / "elsewhere")


def test_settings_with_full_paths_mean_the_same_everywhere(project, tmp_path, monkeypatch):
    config = Config().replace(
        {"workdir": "runs/x", "model.source": "base", "data.source": "data/a.jsonl:2,data/b.jsonl"}
    )
    root = tmp_path / "my project"
    project()
    full = with_full_paths(config)
    assert paths(full) == {
        "model.source": str(root / "base"),
        "data.source": f"{root}/data/a.jsonl:2,{root}/data/b.jsonl",
    }
    assert full.workdir == str(root / "runs/x")
    assert paths(with_full_paths(Config())) == paths(Config())


def test_paths_from_a_folder_are_the_same_from_everywhere(project, tmp_path, monkeypatch):
    project()
    search, given = tmp_path / "my project/search", {"model.source": "base", "data.source": "data/a.jsonl:2,sample:x"}
    wanted = {"model.source": "../base", "data.source": "../data/a.jsonl:2,sample:x"}
    assert paths_from(Config().replace(given), search).items() >= wanted.items()
    monkeypatch.chdir(tmp_path / "elsewhere")
    given = {"model.source": "../my project/base", "data.source": "../my project/data/a.jsonl:2,sample:x"}
    assert paths_from(Config().replace(given), search).items() >= wanted.items()
    assert paths_from(Config(), search) == {name: path_setting(Config(), name) for name in PATH_SETTINGS}


def test_same_files_by_other_names(project, tmp_path, monkeypatch):
    project()
    root = tmp_path / "my project"
    assert same_files("data/a.jsonl", f"{root}/data/../data/a.jsonl")
    assert same_files("data/a.jsonl:2,data/b.jsonl", f"{root}/data/a.jsonl:2,./data/b.jsonl")
    assert same_files("sample:x,data/a.jsonl", f"sample:x,{root}/data/a.jsonl")
    assert same_files("tiny", "tiny") and same_files("", "")
    for other in ("data/b.jsonl", "data/a.jsonl:2", "data/a.jsonl,data/b.jsonl", ""):
        assert not same_files("data/a.jsonl", other)
    assert not same_files("tiny", f"{root}/tiny") and not same_files("sample:x", "sample:y")


def test_files_exist(project):
    project()
    for value in (
        "data/a.jsonl",
        "data/*.jsonl",
        "data/a.jsonl:0.5,data/b.jsonl",
        "sample:x",
        "tfds:x",
        "hf://a/b",
        "",
    ):
        assert files_exist(value), value
    for value in ("data/c.jsonl", "data/a.jsonl,data/c.jsonl", "*.csv"):
        assert not files_exist(value), value
