"""Every command and every program in README and docs is understood, and runs.

On a tiny model in the place of a real one: what the real one does with such commands is shown by tests/demo.
"""

import configparser
import functools
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from typing import ClassVar

import pytest
from helpers.documents import PAGES, README, ROOT, blocks, commands, inline_codes, name_of

import gemma_tune
from gemma_tune.cli.main import VERBS, run
from gemma_tune.cli.verb import Invocation, Verb
from gemma_tune.config import Config, GenerationConfig
from gemma_tune.settings import setting_paths

URL = "http://127.0.0.1:8000"
SHORT = [
    "--config.training.num_train_steps=2",
    "--config.training.num_scored_answers=1",
    "--config.training.num_sample_answers=1",
    "--config.generation.max_new_tokens=2",
]
FAST_SERVER = ["--port=0", "--json", "--max_concurrent=2", "--max_length=512", "--max_tokens_in_flight=1024"]
# Programs that these tests don't run: pip changes the environment, and what the others do is CI itself.
NOT_RUN = {"pip", "pytest", "ruff", "mypy", "zensical"}
REAL_MODELS = re.compile(r"\b(demo|gemma3_1b)\b")


def verb_of(name) -> Verb:
    return importlib.import_module(f"gemma_tune.cli.{name}").VERB


def gemma_tune_commands(page):
    """Yields the words of each gemma-tune command of a page: in its sh and text blocks, and between backticks."""
    for block in blocks(page, "sh", "text"):
        lines = [line for line in block.text.splitlines() if line.startswith("gemma-tune ") or block.language == "sh"]
        yield from (words for words in commands("\n".join(lines)) if words[0] == "gemma-tune")
    for code in inline_codes(page):
        if code.startswith("gemma-tune "):
            yield from commands(code)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_command_is_one_that_the_program_understands(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in gemma_tune_commands(page):
        if words[1].startswith("-") or words[1].isupper():  # `gemma-tune --help`, `gemma-tune COMMAND --help`
            continue
        assert words[1] in VERBS, words
        verb = verb_of(words[1])
        values, overrides, positional = verb.parse(words[2:])
        takes_a_file = any(word.startswith("--config=") and not word.startswith("--config=configs/") for word in words)
        if verb.takes_config and not takes_a_file:
            Invocation(verb, words[2:], values, overrides, positional, None).config()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_flag_and_setting_between_backticks_exists(page):
    flags = {flag.name for name in VERBS for flag in verb_of(name).all_flags} | {"merge"}
    settings = set(setting_paths(Config))
    groups = {path.split(".")[0] for path in settings if "." in path}
    for code in inline_codes(page):
        if code.startswith("--config."):
            name = code.removeprefix("--config.").partition("=")[0]
            assert name in settings or name == "KEY", code
        elif code.startswith("--"):
            name = code.removeprefix("--").partition("=")[0].split()[0]
            assert name in flags, code
        elif re.fullmatch(rf"({'|'.join(groups)})\.[a-z0-9_]+", code) and code != "model.tflite":
            assert code in settings, code


def test_what_is_installed_are_extras_that_exist_and_ci_runs_the_test_command():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    for page in PAGES:
        for named in re.findall(r"(?:\.|gemma-tune)\[([\w,]+)\]", page.read_text()):
            assert set(named.split(",")) <= extras, (page, named)
    assert extras <= set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/installation.md").read_text(), re.MULTILINE))
    assert r"pip install -e '.\[test\]' && pytest" in (ROOT / ".ci/run").read_text()
    assert README.read_text().count("pip install -e '.[test]' && pytest") == 1


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A folder with questions.jsonl (the README's example, thirty times with other words), and runs/mine."""
    folder = tmp_path_factory.mktemp("finished")
    (example,) = [json.loads(block.text) for block in blocks(README, "json")]
    rows = [{**example, "prompt": f"{example['prompt']} It is a Halden {i}."} for i in range(30)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["train", "--data=questions.jsonl", "--model=tiny", "--workdir=runs/mine", *SHORT]) == 0
    return folder


class PageRunner:
    """Runs the blocks of a page, one after the other."""

    run_already: ClassVar[set[tuple[str, ...]]] = set()

    def __init__(self, folder, monkeypatch, capfd):
        self.folder, self.monkeypatch, self.capfd = folder, monkeypatch, capfd
        self.server, self.url = None, URL
        self.verbs = set()

    def run_block(self, block):
        text = REAL_MODELS.sub("tiny", block.text).replace(URL, self.url)
        if block.language == "python":
            short = functools.partial(Config, generation=GenerationConfig(max_new_tokens=2))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gemma_tune, "Config", short, raising=False)
                exec(compile(text, "page", "exec"), {"__name__": "page"})
            return
        for words, real_words in zip(commands(text), commands(block.text.replace(URL, self.url)), strict=True):
            if words[0] == "gemma-tune":
                self.run_command(real_words if words[1] == "plan" else words)
            elif words[0] == "curl":
                self.run_curl(words)
            else:
                assert words[0] in NOT_RUN, words

    def run_command(self, words):
        self.verbs.add(words[1])
        if words[1] == "serve":
            self.start_server(words[1:])
            return
        if words[1] in ("quickstart", "doctor", "models"):  # They read nothing of the folder: once is enough.
            if tuple(words) in self.run_already:
                return
            self.run_already.add(tuple(words))
        self.monkeypatch.setattr("sys.stdin", io.StringIO("How do I reset my phone?\n"))
        code = run(with_tiny_model(words))
        assert code == 0, (shlex.join(words), self.capfd.readouterr().err[-2000:])

    def run_curl(self, words):
        if shutil.which("curl"):
            options = ["--fail", "--silent", "--show-error"]
            reply = subprocess.run([*words, *options], capture_output=True, text=True, timeout=120)
            assert reply.returncode == 0 and json.loads(reply.stdout), (words, reply.stderr)

    def start_server(self, arguments):
        self.stop_server()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "gemma_tune", *arguments, *FAST_SERVER],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=self.folder, env=environment,
        )  # fmt: skip
        line = self.server.stdout.readline()
        assert line, f"{shlex.join(arguments)} did not start"
        self.url = json.loads(line)["url"]

    def stop_server(self):
        if self.server:
            self.server.send_signal(signal.SIGTERM)
            self.server.communicate(timeout=60)
            self.server = None


def with_tiny_model(words):
    """Returns a command's arguments on the tiny model and with few steps, unless it names its own."""
    verb, arguments = words[1], list(words[1:])
    if verb in ("train", "quickstart", "tune"):
        arguments += SHORT
    if verb == "tune":
        arguments.append("--budget=2_trials")
    if verb in ("train", "quickstart", "tune", "data") and not any(
        word.startswith(("--model", "--config=")) for word in words
    ):
        arguments.append("--model=tiny")
    if verb in ("generate", "chat", "compare"):
        arguments.append("--max_new_tokens=2")
    return arguments


@pytest.fixture
def runner(tmp_path, finished_run, monkeypatch, capfd):
    shutil.copy(finished_run / "questions.jsonl", tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    runner = PageRunner(tmp_path, monkeypatch, capfd)
    yield runner
    runner.stop_server()


def pages_to_run():
    """Yields the pages with commands: README for every run of CI, the others for the night."""
    for page in PAGES:
        if blocks(page, "sh", "python"):
            mark = pytest.mark.slow if page == README else pytest.mark.nightly
            yield pytest.param(page, id=name_of(page), marks=mark)


@pytest.mark.parametrize("page", list(pages_to_run()))
def test_every_command_and_program_runs(page, runner, finished_run):
    if page != README:  # Other pages go on from a finished run; README makes its own.
        for name in ("mine", "other"):
            shutil.copytree(finished_run / "runs/mine", runner.folder / "runs" / name)
    for block in blocks(page, "sh", "python"):
        runner.run_block(block)
    if page == README:
        assert {"quickstart", "data", "train", "eval", "chat"} <= runner.verbs
        assert (runner.folder / "runs/mine/adapter").is_dir()
        assert (runner.folder / "runs/from_python/report.html").exists()


def test_every_verb_has_a_command_that_is_run():
    text = "\n".join(block.text for page in PAGES for block in blocks(page, "sh"))
    assert {words[1] for words in commands(text) if words[0] == "gemma-tune"} == set(VERBS)
