"""`gemma-tune export` of a run: what is written, and mistakes that write nothing."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from huggingface_hub import ModelCard


@pytest.mark.parametrize(("name", "library"), [("keras", "keras-hub"), ("hf", "transformers")])
def test_a_run_is_exported_with_a_card(call, trained, tmp_path, name, library):
    output = tmp_path / "mine"
    code, out, err = call(
        "export", f"--model={trained}", f"--format={name}", f"--output={output}", "--json", "--datasets=me/it"
    )
    assert code == 0, err
    done = json.loads(out)
    assert done["bytes"] == sum((output / file).stat().st_size for file in done["files"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    data = ModelCard.load(output / "README.md").data
    assert (data.license, data.library_name, data.datasets, data.language) == ("apache-2.0", library, ["me/it"], ["en"])
    results = json.loads((trained / "result.json").read_text())
    loss = next(one.metric_value for one in data.eval_results if one.metric_type == "loss")
    assert loss == pytest.approx(results["heldout_after"]["loss"], abs=1e-6)
    text = (output / "README.md").read_text()
    for known in (
        json.loads((trained / "versions.json").read_text())["data"],
        "train.jsonl",
        results["samples"][0]["question"],
    ):
        assert known in text
    losses = []
    for source in (trained, output):
        code, out, err = call(
            "eval", f"--model={source}", "--data=sample:smartphone_support", "--max_length=128", "--json"
        )
        assert code == 0, err
        values = json.loads(out)
        losses.append((values["tuned"] or values["base"])["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "library", "says"),
    [("peft", "peft", "PeftModel.from_pretrained"), ("gguf", "gguf", "llama-cli -m mine/model-f16.gguf")],
)
def test_formats_of_other_programs(call, trained, tmp_path, name, library, says):
    """What they hold is tested elsewhere; here, that the verb writes it, with a card, and the next command works."""
    output = tmp_path / "my exports" / "mine"
    code, out, err = call("export", f"--model={trained}", f"--format={name}", f"--output={output}", "--json")
    assert code == 0, err
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == library and says in card.text and card.data.eval_results
    command = shlex.split(json.loads(out)["next"][0])
    code, _, err = call("generate", *command[2:], "--max_new_tokens=3", "Hi")
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--format=peft"], 2, "The model has no LoRA for --format=peft"),
        (["--format=peft", "--merge"], 2, "there are no weights to merge them into"),
        (["--format=gguf", "--scheme=q5"], 1, "There is no GGUF scheme 'q5'"),
        (["--format=gguf", "--model=tiny:gemma4"], 1, "not gemma4"),
    ],
)
def test_what_a_format_cannot_hold(call, tmp_path, arguments, code, message):
    found, _, err = call("export", "--model=tiny", *arguments, f"--output={tmp_path}/o")
    assert found == code and message in err and not list(tmp_path.iterdir())


def test_an_adapter_tells_of_its_run(call, trained, tmp_path):
    output = tmp_path / "mine"
    code, _, err = call(
        "export", "--model=tiny", f"--adapter={trained}/adapter", "--format=keras", "--nomerge", f"--output={output}"
    )
    assert code == 0, err
    card = ModelCard.load(output / "README.md")
    assert card.data.eval_results and "lora.rank" in card.text and 'adapter="mine/adapter"' in card.text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--output=o"], 2, "--format=… is missing"),
        (["--format=hf"], 2, "--output=… is missing"),
        (["--format=hff", "--output=o"], 2, "Did you mean hf?"),
        (["--format=hf", "--output=taken"], 1, "exists already"),
        (["--format=hf", "--output=taken", "--overwrite"], 1, "is no export of gemma_tune"),
        (["--format=hf", "--output=o", "--dtype=int8"], 2, "dtype must be one of float32, bfloat16, float16"),
        (["--format=hf", "--output=o", "--max_shard_size=big"], 2, "max_shard_size: 'big' is not a size"),
        (["--format=hf", "--output=o", "--nomerge"], 2, "holds LoRA merged into the weights"),
        (["--format=hf", "--output=o", "--adapter=nowhere"], 1, "There is no adapter at nowhere"),
        (["--format=hf", "--output=o", "--language=English"], 2, "language must be codes"),
        (["--format=hf", "--output=taken/file/o"], 1, "can't be written: Not a directory"),
    ],
)
def test_mistakes_write_nothing(call, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    found, _, err = call("export", "--model=tiny", *arguments)
    assert found == code and message in err and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_disk_too_small_is_said_before_anything_is_written(call, tmp_path, monkeypatch):
    almost_full = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: almost_full)
    code, _, err = call("export", "--model=tiny", "--format=hf", f"--output={tmp_path}/o")
    assert code == 1 and "needs about 0.05 GB, and the disk has 0.00 GB left" in err
    assert not list(tmp_path.iterdir())


def test_overwriting_and_kill_9(call, tmp_path):
    """The old export stays while a new one is written, and when that one is killed; TensorFlow isn't heard."""
    output, arguments = tmp_path / "o", ["--model=tiny", "--format=hf", f"--output={tmp_path}/o"]
    assert call("export", *arguments)[0] == 0
    before = (output / "export.json").stat().st_mtime_ns
    slow = (
        "import sys, time; from gemma_tune.export.hf import directory; real = directory.write_shards;"
        "directory.write_shards = lambda *a: (real(*a), print('written', flush=True), time.sleep(60));"
        "from gemma_tune.cli.main import run; run(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "export", *arguments, "--overwrite"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "written\n"
    code, _, err = call("export", *arguments, "--overwrite")
    assert code == 1 and "another process is writing there" in err
    os.kill(process.pid, signal.SIGKILL)
    assert process.communicate()[1] == ""
    assert (output / "export.json").stat().st_mtime_ns == before
    time.sleep(0.1)
    assert call("export", *arguments, "--overwrite")[0] == 0
    assert (output / "export.json").stat().st_mtime_ns > before
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
