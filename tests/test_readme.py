"""Every command and program in the README runs. Where it would take the real model, the tiny one stands in: what the
real one does with the same commands is shown by tests/demo.
"""

import configparser
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from gemma_tune.cli.main import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHORT = [
    "--config.training.num_train_steps=2",
    "--config.training.num_scored_answers=1",
    "--config.training.num_sample_answers=1",
    "--config.generation.max_new_tokens=2",
]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands():
    """Every line of every sh block, cut at `&&`, as words."""
    for line in "\n".join(blocks("sh")).splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the README's own example, thirty times with other words, as questions.jsonl, and configs/."""
    (example,) = [json.loads(block) for block in blocks("json")]
    rows = [{**example, "prompt": f"{example['prompt']} It is a Halden {i}."} for i in range(30)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_tiny_model(words):
    """Returns a command on the tiny model and with few steps, unless it names its own."""
    verb = words[1]
    arguments = list(words[1:])
    if verb in ("train", "quickstart"):
        arguments += SHORT
    if verb in ("train", "quickstart", "data") and not any(word.startswith(("--model", "--config=")) for word in words):
        arguments.append("--model=tiny")
    if verb in ("generate", "chat", "compare"):
        arguments.append("--max_new_tokens=2")
    return arguments


@pytest.mark.slow
def test_every_command_runs(folder, monkeypatch, capfd):
    seen = []
    for words in commands():
        if words[0] == "gemma-tune":
            monkeypatch.setattr("sys.stdin", io.StringIO("How do I reset my phone?\n"))
            code = run(with_tiny_model(words))
            assert code == 0, (words, capfd.readouterr().err[-2000:])
            seen.append(words[1])
    assert {
        "quickstart",
        "data",
        "train",
        "eval",
        "quantize",
        "merge",
        "compare",
        "generate",
        "chat",
        "models",
        "doctor",
    } <= set(seen)
    assert (folder / "runs/mine/adapter").is_dir()


def test_what_is_installed_are_extras_that_exist_and_ci_runs_the_test_command():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    others = [words for words in commands() if words[0] != "gemma-tune"]
    for words in others:
        if words[:2] == ["pip", "install"]:
            assert words[2] == "-e" and set(re.fullmatch(r"\.\[(.+)\]", words[3])[1].split(",")) <= extras
        else:
            assert words == ["pytest"]
    assert r"pip install -e '.\[test\]' && pytest" in (ROOT / ".ci/run").read_text()
    assert README.count("pip install -e '.[test]' && pytest") == 1


def test_the_python_program_runs(folder, capsys):
    (program,) = blocks("python")
    assert '"gemma3_1b"' in program
    exec(program.replace('"gemma3_1b"', '"tiny"'), {})
    assert capsys.readouterr().out.strip()
    assert (folder / "runs/mine/report.html").exists()


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and not [link for link in links if "://" not in link and not (ROOT / link).exists()]
