"""Runs that are used from other folders, moved, resumed elsewhere and trained further; paths as people type them."""

import json
import os
import shlex
import shutil

import numpy as np
import pytest
from helpers.cli_arguments import FAST

from gemma_tune.cli.config_resolution import load_config_file
from gemma_tune.cli.main import run
from gemma_tune.config import Config
from gemma_tune.export import export_model
from gemma_tune.models.load import load_tokenizer
from gemma_tune.models.lora.adapter_file import read_adapter
from gemma_tune.models.sources.published_sizes import backbone_without_weights
from gemma_tune.models.sources.weight_files import weight_files
from gemma_tune.pipeline.serve import resolve_base
from gemma_tune.workdir_config import read_workdir_config

STEPS = 4
SETTINGS = [
    *FAST, "--max_length=64", "--batch_size=4", "--config.training.eval_every_steps=0",
    f"--config.training.num_train_steps={STEPS}", "--config.training.checkpoint_every_steps=2", "--config.training.keep_last=3",
]  # fmt: skip
TRAIN = ["train", "--model=base", "--data=rows.jsonl", "--workdir=run", *SETTINGS]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder `here` with a base, rows and a run on both, all named by relative paths."""
    here = tmp_path_factory.mktemp("project") / "here"
    here.mkdir()
    rows = [{"prompt": f"Which lamp is number {i}?", "completion": f"The {i}th from the door."} for i in range(24)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export_model("tiny", "keras", here / "base")
    before = os.getcwd()
    os.chdir(here)
    try:
        assert run(TRAIN) == 0
    finally:
        os.chdir(before)
    return shutil.move(here, here.with_name("kept"))  # Nothing is any more where the run was begun.


@pytest.fixture
def here(made, tmp_path):
    """A copy of it in a folder of which nothing is saved anywhere."""
    return shutil.copytree(made, tmp_path / "with space" / "copy")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another folder, in which one stands."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def factors(workdir):
    return read_adapter(workdir / "adapter" / "adapter.safetensors")[1]


def assert_same_factors(one, other):
    assert one.keys() == other.keys() and one
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_every_verb_finds_base_and_data(call, here, elsewhere):
    """From another folder, after all was moved together."""
    source = f"--model={here / 'run'}"
    assert call("generate", source, "Which lamp is number 3?")[0] == 0
    code, out, err = call("eval", source, "--config.generation.max_new_tokens=2", "--num_questions=2", "--json")
    assert code == 0, err
    saved = json.loads((here / "run/result.json").read_text())
    assert json.loads(out)["tuned"]["loss"] == pytest.approx(saved["heldout_after"]["loss"], rel=1e-5)
    assert call("merge", source, "--output=merged")[0] == 0
    code, _, err = call("export", source, "--format=hf", "--output=hf")
    assert code == 0, err
    marker = json.loads((elsewhere / "hf/export.json").read_text())["provenance"]
    assert marker["base"] == str(here / "base") and list(marker["data_files"]) == ["rows.jsonl"]
    assert marker["config"]["data"]["source"] == "rows.jsonl"  # The card shows what was typed.


def test_what_reads_no_weights_finds_the_base(here, elsewhere):
    run_ = str(here / "run")
    assert load_tokenizer(run_)[1] == "gemma3"
    assert weight_files(run_)[0].parent == here / "base"
    assert backbone_without_weights(run_, "float32").num_layers > 0
    base = resolve_base(Config().replace({"model.source": run_}), "")
    assert (base.source, base.name, list(base.adapters)) == (str(here / "base"), "base", ["run"])


def test_compare_on_what_was_held_out(call, here, elsewhere):
    code, out, err = call("compare", f"--reference={here / 'run'}", f"--candidates={here / 'base'}", "--num_answers=0",
                          "--max_length=64", "--output=", "--json")  # fmt: skip
    assert code == 0, err
    assert str(here / "rows.jsonl") in json.loads(out)["data_source"]


def test_resuming_from_elsewhere_is_the_same_run(call, here, elsewhere):
    """By its own config, and by the same flags with other paths: bit for bit the factors of the run that wasn't cut."""
    before, saved = factors(here / "run"), (here / "run/config.json").read_text()
    again = [
        f"--model={here}/base",
        f"--data=../{here.parent.name}/copy/rows.jsonl",
        f"--workdir={here}/run",
        *SETTINGS,
    ]
    for arguments in ([f"--config={here / 'run'}"], again):
        shutil.rmtree(here / "run/checkpoints" / str(STEPS))
        shutil.rmtree(here / "run/adapter")
        code, _, err = call("train", *arguments)
        assert code == 0, err
        assert f"Resuming from the checkpoint of step {STEPS - 2}" in err and "Changed since" not in err
        assert_same_factors(factors(here / "run"), before)
        assert (here / "run/config.json").read_text() == saved  # So that it can be moved again.
    assert not list(elsewhere.iterdir())


def test_data_that_have_moved_must_be_the_same_rows(call, here, elsewhere):
    moved = elsewhere / "far away"
    moved.mkdir()
    shutil.move(here / "rows.jsonl", moved / "rows.jsonl")
    resume = ["train", f"--config={here / 'run'}", f"--data={moved / 'rows.jsonl'}"]
    code, _, err = call(*resume)
    assert code == 0 and "Changed since" not in err, err
    assert read_workdir_config(here / "run").data.source == str(moved / "rows.jsonl")
    shutil.move(moved / "rows.jsonl", moved / "other.jsonl")
    (moved / "rows.jsonl").write_text(
        (moved / "other.jsonl").read_text() + '{"prompt": "New?", "completion": "Yes."}\n'
    )
    os.rename(moved, elsewhere / "again")
    code, _, err = call("train", f"--config={here / 'run'}", f"--data={elsewhere / 'again/rows.jsonl'}")
    assert code == 1 and "again/rows.jsonl', which holds other rows" in err


def test_other_data_are_refused_before_they_are_read(call, here, monkeypatch):
    monkeypatch.chdir(here)
    shutil.copy("rows.jsonl", "others.jsonl")
    code, _, err = call(*[each.replace("rows.jsonl", "others.jsonl") for each in TRAIN])
    assert code == 1 and "data.source was 'rows.jsonl', is 'others.jsonl'" in err and "Attention" not in err


def test_a_base_that_is_gone(call, here, elsewhere):
    shutil.move(here / "base", elsewhere / "base elsewhere")
    run_ = here / "run"
    for verb in (("generate", "Hi"), ("export", "--format=hf", "--output=x"), ("merge", "--output=x"), ("eval",)):
        code, _, err = call(verb[0], f"--model={run_}", *verb[1:])
        assert code == 1 and f"The base model of {run_} was " in err and "/here/base. It isn't there any more" in err, (
            err
        )
        assert f"--model=FOLDER --adapter='{run_}/adapter'" in err
    code, _, err = call("generate", "--model=base elsewhere", f"--adapter={run_}", "Hi")  # A run is its adapter, too.
    assert code == 0, err


def test_a_full_model_needs_its_base_for_comparisons_alone(call, here, elsewhere):
    """Its base is missed before anything is loaded, and only where it is needed."""
    run_ = here / "run"
    shutil.copytree(here / "base", run_ / "model")
    shutil.rmtree(here / "base")
    scored = ["eval", f"--model={run_}", f"--data={here / 'rows.jsonl'}", "--num_questions=1",
              "--config.generation.max_new_tokens=1"]  # fmt: skip
    code, _, err = call(*scored)
    assert code == 1 and "--against=FOLDER, or --against=none" in err and "Loading" not in err
    code, _, err = call(*scored, "--against=none")
    assert code == 0, err


def test_data_that_are_gone(call, here, elsewhere):
    (here / "rows.jsonl").unlink()
    code, _, err = call("eval", f"--model={here / 'run'}")
    assert code == 1 and "rows.jsonl. " in err and "name them: --data=FILE" in err
    assert "/here/rows.jsonl" in err  # Where it was.


def heldout_losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["heldout_loss"] for row in rows if "heldout_loss" in row]


def test_more_steps_on_a_finished_run(call, here, monkeypatch):
    """The refusal names the flags with which it works: what was learnt is where the new run begins, its rate too."""
    monkeypatch.chdir(here)
    more = [each.replace(f"num_train_steps={STEPS}", "num_train_steps=6") for each in TRAIN]
    code, _, err = call(*more)
    assert code == 1 and f"training.num_train_steps was {STEPS}, is 6" in err
    flag = next(word for word in shlex.split(err) if word.startswith("--adapter="))
    assert flag == "--adapter=run/adapter" and "another --workdir" in err
    code, _, err = call(*TRAIN)  # Nothing is left to do: it says the same.
    assert code == 0 and "All of its steps are done. To train this finished run further" in err and flag in err
    code, _, err = call(*[each for each in more if "workdir" not in each], "--workdir=more", flag)
    assert code == 0, err
    assert heldout_losses(here / "more")[0] == heldout_losses(here / "run")[-1] != heldout_losses(here / "run")[0]
    rates = [json.loads(line)["learning_rate"] for line in (here / "more/metrics.jsonl").read_text().splitlines()
             if "learning_rate" in line]  # fmt: skip
    assert max(rates) > 0


def test_paths_with_a_tilde_that_the_shell_leaves(call, here, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(here / "rows.jsonl", home / "desk.jsonl")
    shutil.move(here / "base", home / "base")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    code, out, err = call("train", "--model=~/base", "--data=~/desk.jsonl", "--workdir=~/run", *SETTINGS, "--json")
    assert code == 0 and sorted(each.name for each in home.iterdir() if each.name[0] != ".") == [
        "base",
        "desk.jsonl",
        "run",
    ]
    assert json.loads(out)["next"][0] == f"gemma-tune chat --model={home}/run"
    assert call("generate", "--model=~/base", "--adapter=~/run/adapter", "Hi")[0] == 0
    code, _, err = call(
        "eval", "--model=~/run", "--num_questions=1", "--output=~/scores", "--config.generation.max_new_tokens=1"
    )
    assert code == 0 and (home / "scores/evaluation.json").exists(), err
    assert call("export", "--model=~/run", "--format=peft", "--output=~/peft")[0] == 0 and (home / "peft").is_dir()
    assert call("train", "--config=~/run", "--dry_run")[0] == 0
    assert not [each for each in here.rglob("*") if "~" in str(each)]


def test_printed_commands_can_be_pasted(call, here, tmp_path, monkeypatch):
    """Spaces, brackets, a comma, accents, what rich would take for an emoji, and the name of a model."""
    folder = tmp_path / "in put [v1] :cat:, données $x 'y'"
    folder.mkdir()
    shutil.copy(here / "rows.jsonl", folder / "rows, final.jsonl")
    monkeypatch.chdir(folder)
    code, out, err = call("train", "--model=tiny", "--data=rows, final.jsonl", f"--workdir={folder}/demo", *SETTINGS)
    assert code == 0, err
    printed = [shlex.split(line) for line in out.splitlines() if line.startswith("  gemma-tune ")]
    assert [words[2] for words in printed] == [f"--model={folder}/demo"] * 2
    assert call(*printed[1][1:], "--max_new_tokens=2")[0] == 0
    code, out, err = call("train", "--model=tiny", "--data=rows, final.jsonl", "--workdir=demo", *SETTINGS)
    assert code == 0, err
    printed = [shlex.split(line) for line in out.splitlines() if line.startswith("  gemma-tune ")]
    assert [words[2] for words in printed] == ["--model=./demo"] * 2  # Else it would be the model of that name.


@pytest.mark.parametrize("place", ["a file", "a file/run", "/proc/nowhere/run"])
def test_a_workdir_that_cannot_be_made_is_refused_at_once(call, here, monkeypatch, place):
    monkeypatch.chdir(here)
    (here / "a file").touch()
    before = sorted(here.rglob("*"))
    code, _, err = call(*[each.replace("--workdir=run", f"--workdir={place}") for each in TRAIN])
    assert code == 1 and err.count("\n") == 1 and "Choose another --workdir" in err and "Attention" not in err
    assert sorted(here.rglob("*")) == before


def test_a_workdir_that_is_only_tried_leaves_nothing(call, here, monkeypatch):
    monkeypatch.chdir(here)
    bad = [each.replace("rows.jsonl", "none.jsonl").replace("--workdir=run", "--workdir=new/deep") for each in TRAIN]
    assert call(*bad)[0] == 1 and not (here / "new").exists()


def test_a_search_goes_on_from_elsewhere_and_its_best_settings_work_there(call, here, elsewhere):
    """The rest of the arguments is the same; best.py has full paths."""
    (here / "space.yaml").write_text("lora.rank: [2, 3]\n")

    def search(root, num_trials):
        return ["tune", f"--model={root}/base", f"--data={root}/rows.jsonl", f"--workdir={root}/search", *SETTINGS,
                f"--space={root}/space.yaml", f"--budget={num_trials}_trials", "--json"]  # fmt: skip

    os.chdir(here)
    code, out, err = call(*search(".", 1))
    assert code == 0, err
    os.chdir(elsewhere)
    code, out, err = call(*search(f"../{here.parent.name}/copy", 2))
    assert code == 0 and len(json.loads(out)["trials"]) == 2, err
    config = load_config_file(str(here / "search/best.py"))
    assert (config.model.source, config.data.source) == (str(here / "base"), str(here / "rows.jsonl"))
    assert config.workdir == str(here / "search/best")
    code, _, err = call("train", f"--config={here}/search/best.py", "--dry_run")
    assert code == 0, err
