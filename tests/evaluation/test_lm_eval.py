"""lm-eval gets from our models what KerasHub computes: choices, perplexity, answers; from Python and its command line."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.documents import DOCS, blocks
from helpers.logits import logits_of
from scipy.special import log_softmax

from gemma_tune.errors import ConfigError
from gemma_tune.evaluation.lm_eval.registered_model import load_described, with_default_model
from gemma_tune.evaluation.lm_eval.requests import ModelRequests, generation_settings
from gemma_tune.models.sharding.placement import mesh_sharding_of
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.serving.generation import generate

QUESTIONS = [
    {"question": "How do I reset the phone?", "choices": ["Hold both keys.", "Yes, we do."], "answer": 0},
    {"question": "Do you ship abroad?", "choices": ["Press the button twice.", "Yes.", "Never"], "answer": 1},
    {"question": "What is the warranty?", "choices": ["Two years", "Blue"], "answer": 0},
]


def without_lm_eval(model, **arguments):
    """The requests' methods, with a cache that keeps what it gets."""
    requests, kept = ModelRequests(model, **arguments), {}
    requests.cache_hook = SimpleNamespace(
        add_partial=lambda kind, key, value: kept.__setitem__((kind, str(key)), value)
    )
    return requests, kept


def request(*args):
    return SimpleNamespace(args=args)


def log_prob_of(model, ids):
    log_probs = log_softmax(logits_of(model, np.array([ids[:-1]], np.int32))[0].astype(float), axis=1)
    return log_probs[np.arange(len(ids) - 1), ids[1:]]


def test_texts_begin_with_one_bos(tiny):
    model = tiny()
    requests, _ = without_lm_eval(model)
    plain = tokenizer_of(model).encode("Hello")
    assert requests.tok_encode("Hello") == requests.tok_encode("<bos>Hello") == [2, *plain]
    assert requests.tok_encode("Hello", add_special_tokens=False) == plain
    assert (requests.prefix_token_id, requests.eot_token_id) == (2, 1)
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "The answer is"},
    ]
    begun = "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert requests.apply_chat_template(history[:2]) == begun
    assert requests.apply_chat_template(history, add_generation_prompt=False) == begun + "The answer is"
    assert requests.tok_encode(begun).count(2) == 1


@pytest.mark.slow
def test_generation_ends_at_a_stop_string_and_equals_ours(tiny):
    model = tiny()
    requests, kept = without_lm_eval(model, batch_size=2)
    prompts = ["Hello", "How do I reset the phone? " * 5, "Yes"]
    contexts = [requests.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts]
    greedy = {"until": [], "max_gen_toks": 12, "do_sample": False}
    whole = requests.generate_until([request(context, greedy) for context in contexts])
    assert [text.strip() for text in whole] == generate(model, prompts, max_new_tokens=12, temperature=0.0)
    assert kept[("generate_until", str((contexts[1], greedy)))] == whole[1]
    longest = max(whole, key=len)
    at = whole.index(longest)
    stop = longest[len(longest) // 2 :][:3]
    (cut,) = requests.generate_until([request(contexts[at], {**greedy, "until": stop})])
    assert cut == longest[: longest.index(stop)] != longest
    with pytest.raises(ConfigError, match=r"max_gen_toks is 12; it must be below max_length, 8\."):
        without_lm_eval(model, max_length=8)[0].generate_until([request("Hello", greedy)])


def test_generation_settings():
    assert generation_settings({}) == ([], 256, (0.0, 0, 1.0, 0.0, 1.0), 0)
    until, longest, sampling, seed = generation_settings(
        {"until": "\n", "max_gen_toks": 7, "do_sample": True, "top_k": 5, "seed": 3}
    )
    assert (until, longest, sampling.temperature, sampling.top_k, seed) == (["\n"], 7, 1.0, 5, 3)
    assert generation_settings({"do_sample": False, "temperature": 0.7})[2].temperature == 0.0
    with pytest.raises(ConfigError, match="'num_beams', which isn't supported"):
        generation_settings({"num_beams": 4})


def test_the_arguments_describe_a_model():
    with pytest.raises(ConfigError, match="model_args has no 'pretrained'.*source="):
        load_described({"pretrained": "tiny"})
    with pytest.raises(ConfigError, match="model_args needs a model"):
        load_described({})
    with pytest.raises(ConfigError, match="quantize must be one of int8.*Did you mean int4"):
        load_described({"source": "tiny", "quantize": "int-4"})
    model = load_described({"source": "tiny:gemma2", "quantize": "nf4", "block_size": 32, "precision": "bfloat16"})
    assert type(model).__name__ == "GemmaCausalLM" and mesh_sharding_of(model.backbone) is None
    assert model.backbone.token_embedding.compute_dtype == "bfloat16"


def test_the_command_line_evaluates_our_model_unless_another_is_named():
    added = ["--model", "gemma_tune"]
    assert with_default_model(["--tasks", "a"]) == ["--tasks", "a", *added]
    assert with_default_model(["run", "--tasks", "a"]) == ["run", "--tasks", "a", *added]
    for others in (["--model", "hf"], ["--model=hf"], ["ls", "tasks"], ["--help"], []):
        assert with_default_model(others) == others


@pytest.fixture
def tasks(tmp_path):
    """A folder of three tasks, which read local files only."""
    rows = [{**row, "reference": row["choices"][row["answer"]]} for row in QUESTIONS]
    (tmp_path / "phones.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "phones.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
    }
    found = {
        "phones_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
        },
        "phones_answer": {
            "output_type": "generate_until",
            "doc_to_target": "{{reference}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        "phones_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    }
    for name, task in found.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))
    return tmp_path


@pytest.mark.peers
def test_local_tasks_get_the_figures_of_keras_hub(tiny, tasks, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from gemma_tune.evaluation.lm_eval import GemmaTuneLM

    model = tiny()
    results = lm_eval.simple_evaluate(
        GemmaTuneLM(model),
        tasks=["phones_choice", "phones_answer", "phones_text"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    tokenizer = tokenizer_of(model)
    num_right = nats = num_bytes = 0
    for row, sample in zip(QUESTIONS, results["samples"]["phones_choice"], strict=True):
        prompt = f"Question: {row['question']}\nAnswer:"
        context = [2, *tokenizer.encode(prompt)]
        wanted = [
            log_prob_of(model, [2, *tokenizer.encode(f"{prompt} {choice}")])[len(context) - 1 :].sum()
            for choice in row["choices"]
        ]
        found = [float(response[0][0]) for response in sample["resps"]]
        assert np.allclose(found, wanted, rtol=0, atol=1e-4)
        num_right += int(np.argmax(wanted)) == row["answer"]
        nats += log_prob_of(model, [2, *tokenizer.encode(row["question"])]).sum()
        num_bytes += len(row["question"].encode())
    assert results["results"]["phones_choice"]["acc,none"] == pytest.approx(num_right / len(QUESTIONS))
    perplexity = results["results"]["phones_text"]["byte_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-nats / num_bytes), rel=1e-5)
    for sample in results["samples"]["phones_answer"]:
        assert "\n" not in sample["resps"][0][0]


@pytest.mark.peers
@pytest.mark.slow
def test_from_the_command_line_with_a_chat_template(tasks):
    pytest.importorskip("lm_eval")
    command = [
        *(sys.executable, "-m", "gemma_tune.evaluation.lm_eval"),
        *("--model_args", "source=tiny,quantize=int8,max_length=512", "--apply_chat_template"),
        *("--include_path", str(tasks), "--tasks", "phones_choice,phones_answer", "--output_path", str(tasks / "out")),
    ]
    done = subprocess.run(
        command, env={**os.environ, "HF_HOME": str(tasks / "home")}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"\|phones_choice\s*\|.*\|acc", done.stdout)
    (file,) = (tasks / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert set(results["results"]) == {"phones_choice", "phones_answer"}
    wrong = subprocess.run([*command[:4], "source=tiny,quantise=int8", *command[5:]], capture_output=True, text=True)
    assert wrong.returncode == 1 and "Did you mean quantize" in wrong.stderr.splitlines()[-1]


@pytest.mark.peers
@pytest.mark.slow
def test_the_pages_commands_and_program(tmp_path, monkeypatch, capsys):
    """lm-eval's own parser takes each command; the task and the program of the page run on a tiny model."""
    pytest.importorskip("lm_eval")
    from lm_eval._cli import HarnessCLI

    page = DOCS / "topics/lm_eval.md"
    lines = [line for block in blocks(page, "text") for line in block.text.splitlines()]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "gemma_tune.evaluation.lm_eval"]
        monkeypatch.setattr("sys.argv", ["lm_eval", *with_default_model(words[3:])])
        arguments = HarnessCLI().parse_args()
        assert arguments.model == "gemma_tune" and "source" in arguments.model_args
        assert set(arguments.model_args) <= {"source", "precision", "quantize", "mesh"}
    (task,), (row,), (program,) = (blocks(page, language) for language in ("yaml", "json", "py"))
    (tmp_path / "tasks").mkdir()
    in_folder = task.text.replace("dataset_kwargs:", f"dataset_kwargs:\n  cache_dir: {tmp_path}/cache")
    (tmp_path / "tasks/phones.yaml").write_text(in_folder)
    (tmp_path / "tasks/phones.jsonl").write_text(row.text)
    monkeypatch.chdir(tmp_path)
    exec(compile(program.text.replace("runs/mine", "tiny"), "page", "exec"), {"__name__": "page"})
    assert "acc_norm,none" in capsys.readouterr().out
