"""`gemma-tune serve` as a user starts and ends it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from gemma_tune.cli.main import run
from gemma_tune.config import Config
from gemma_tune.errors import ConfigError
from gemma_tune.runtime.atomic_files import write_json
from gemma_tune.serve_config import ServeConfig

FAST = ["--max_concurrent=2", "--max_length=512", "--max_tokens_in_flight=1024", "--max_queued=4"]


class Process:
    """A server as a process of its own; `about` is what it said when it was ready."""

    def __init__(self, *arguments, cwd=None):
        command = [sys.executable, "-m", "gemma_tune", "serve", "--port=0", "--json", *FAST, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment
        )
        line = self.process.stdout.readline()
        self.about = json.loads(line) if line else {}

    def end(self, number):
        """Sends a signal; returns the exit code and what was printed on stderr."""
        self.process.send_signal(number)
        _, printed = self.process.communicate(timeout=60)
        return self.process.returncode, printed


@pytest.mark.slow
def test_what_is_under_way_at_sigterm_is_answered_and_nothing_new(tmp_path, write):
    keys = write("keys.txt", "secret\n")
    server = Process("--model=tiny", f"--api_key_file={keys}", "--log_requests", cwd=tmp_path)
    url, headers = server.about["url"], {"authorization": "Bearer secret"}
    assert (server.about["models"], server.about["needs_key"]) == (["tiny"], True)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 400, "stream": True}
    started, lines = threading.Event(), []

    def read():
        with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60) as reply:
            for line in reply.iter_lines():
                lines.append(line)
                started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(30)
    code, printed = server.end(signal.SIGTERM)
    reader.join()
    assert "data: [DONE]" in lines
    assert '"finish_reason":"length"' in "".join(lines) or '"finish_reason":"stop"' in "".join(lines)
    assert code == 143
    assert "gemma-tune serve: stopped." in printed and "Traceback" not in printed
    assert "POST '/v1/chat/completions' 200" in printed and "secret" not in printed
    assert (tmp_path / "runs" / "feedback.db").exists()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/health")


@pytest.mark.nightly
def test_what_is_not_answered_in_time_is_told_so():
    server = Process("--model=tiny", "--drain_seconds=0", "--feedback_db=")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 450, "stream": True}
    with httpx2.stream("POST", f"{server.about['url']}/v1/chat/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        last = [line for line in lines if line.startswith("data: ")][-1]
    assert json.loads(last[6:])["error"]["code"] == "shutting_down"
    assert server.process.wait(60) == 130
    server.process.communicate()


@pytest.mark.nightly
def test_of_a_run_base_and_tuned_model_can_be_asked(tmp_path):
    workdir = tmp_path / "mine"
    train = ["train", "--model=tiny", "--max_length=64", "--batch_size=2", f"--workdir={workdir}"]
    short = ["num_train_steps=2", "num_sample_answers=0", "num_scored_answers=0"]
    assert run([*train, *(f"--config.training.{setting}" for setting in short)]) == 0
    server = Process(f"--model={workdir}", f"--adapter=other={workdir}", "--feedback_db=")
    assert server.about["models"] == ["mine", "other", "tiny"]
    models = httpx2.get(f"{server.about['url']}/v1/models").json()["data"]
    assert [model["parent"] for model in models] == ["tiny", "tiny", None]
    code, _ = server.end(signal.SIGTERM)
    assert code == 143


def test_a_port_in_use_is_said_before_anything_is_loaded(capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        started = time.perf_counter()
        assert run(["serve", "--model=no_such_model", f"--port={taken.getsockname()[1]}"]) == 2
    assert "can't be used: Address already in use" in capfd.readouterr().err
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_queued=0"], "max_queued must be at least 1, got 0"),
        (["--max_tokens_in_flight=100"], "max_tokens_in_flight must be at least max_length=2048"),
        (["--port=70000"], "port must lie between 0 and 65535"),
        (["--request_timeout_seconds=0"], "request_timeout_seconds must be above 0"),
        (["--api_key_file=/nowhere"], "--api_key_file=/nowhere can't be read"),
        (["--host="], "host must be an address"),
        (["--adapter=runs/mine"], "write --adapter=NAME=PATH"),
        (["--adapter=tiny=x"], "there is already a model named 'tiny'"),
        (["--prot=8"], "Did you mean port"),
    ],
)
def test_wrong_settings_are_usage_errors(arguments, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["serve", "--model=tiny", *([] if "port" in arguments[0] else ["--port=0"]), *arguments]) == 2
    assert message in capfd.readouterr().err


def test_missing_packages_are_named_with_the_command_that_gets_them(capfd, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert run(["serve", "--model=tiny"]) == 2
    assert "needs uvicorn. Run: pip install 'gemma-tune[serve]'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("source", "name"),
    [("tiny:gemma2", "tiny:gemma2"), ("demo", "demo"), ("kaggle://keras/gemma3/keras/gemma3_1b/4", "gemma3_1b"),
     ("hf://google/gemma-3-1b-it", "gemma-3-1b-it"), ("gemma3_1b", "gemma3_1b")],
)  # fmt: skip
def test_a_model_is_named_by_the_last_part_that_says_something(source, name):
    from gemma_tune.pipeline.serve import resolve_base

    assert resolve_base(Config().replace({"model.source": source}), "").name == name
    assert resolve_base(Config().replace({"model.source": source}), "mine").name == "mine"


def test_a_run_is_its_base_and_an_adapter_held_as_it_was_trained(tmp_path):
    from gemma_tune.pipeline.serve import resolve_base

    for name, called in (("support", "tiny"), ("tiny", "tiny-base")):
        workdir = tmp_path / name
        (workdir / "adapter").mkdir(parents=True)
        (workdir / "adapter" / "adapter.safetensors").touch()
        config = Config().replace({"model.source": "tiny", "training.method": "qlora"})
        write_json(workdir / "config.json", config.to_dict())
        base = resolve_base(Config().replace({"model.source": str(workdir)}), "")
        assert (base.source, base.name, base.quant_spec.scheme) == ("tiny", called, "nf4")
        assert base.adapters == {name: workdir / "adapter"}


def test_where_others_reach_it_without_a_key_a_warning_is_printed(capfd):
    from gemma_tune.cli.output import Output
    from gemma_tune.cli.server_address import announce, is_loopback, server_address

    for host, has_keys, warns in (("0.0.0.0", False, True), ("0.0.0.0", True, False), ("127.0.0.1", False, False)):
        announce(server_address(host, 8000, ["m"], has_keys), Output(False))
        printed = " ".join(capfd.readouterr().out.split())
        assert ("no API key is needed" in printed) == warns, host
        assert "http://127.0.0.1:8000/v1/chat/completions" in printed
        assert ("Bearer KEY" in printed) == has_keys
    assert [is_loopback(host) for host in ("::1", "localhost", "127.8.0.1", "::", "example.com")] == [True] * 3 + [
        False
    ] * 2


def test_a_server_for_this_machine_alone_is_addressed_as_such_unless_it_asks_for_keys():
    from gemma_tune.cli.server_address import allowed_hosts

    assert set(allowed_hosts(ServeConfig(host="127.0.0.2"), False)) == {"localhost", "127.0.0.1", "[::1]", "127.0.0.2"}
    assert allowed_hosts(ServeConfig(), True) == allowed_hosts(ServeConfig(host="0.0.0.0"), False) == ()
    assert allowed_hosts(ServeConfig(allowed_hosts="chat.example"), True) == ("chat.example",)


def test_settings_that_are_lists_are_given_with_commas():
    assert ServeConfig(cors_origins="https://a,https://b").cors_origins == ("https://a", "https://b")
    with pytest.raises(ConfigError, match="max_body_bytes must be at least 1024"):
        ServeConfig(max_body_bytes=3)
