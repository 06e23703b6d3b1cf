"""Tokens a second of the serving engine, beside KerasHub's and transformers' `generate`.

    python -m benchmarks.serving [--model=demo] [--repeats=3] [--json]

All answer the same prompts greedily, in processes that take turns. One request: a prompt of 32 tokens; the time to its
first token is that of an answer of one token, and the rate of decoding is that of the other 63 of an answer of 64.
Eight requests: prompts of 16 to 200 tokens and answers of 24 to 64, asked at once and one after the other. The engine
compiles nothing after its start, or the benchmark fails.
Needs `pip install -e '.[demo,peers]'`; a contender that isn't installed is left out and named.

What must be reached stands beside each figure; a figure that is missed ends the benchmark with exit code 1.
"""

import json
import statistics
import sys
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.jobs import documents
from benchmarks.machine import describe
from benchmarks.processes import Contender
from benchmarks.sources import installed
from benchmarks.verdicts import Verdict, verdict_table

_MODEL = flags.DEFINE_string("model", "demo", "The model. transformers can answer with `demo` alone.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Rounds; the median counts.", lower_bound=1)
_CONTENDERS = flags.DEFINE_list(
    "contenders", ["float32", "int8", "keras_hub", "transformers"], "Whom to measure; also int4, nf4."
)
_NUM_NEW = flags.DEFINE_integer("num_new", 64, "Tokens of the single request's answer.", lower_bound=2)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")

_PROMPT_TOKENS = 32
_EIGHT_PROMPTS = (16, 32, 200, 48, 100, 24, 150, 64)
_EIGHT_ANSWERS = (64, 24, 40, 56, 32, 64, 48, 40)
_PEERS = ("keras_hub", "transformers")


def contenders() -> dict[str, Contender]:
    """Returns those that can run here, by name."""
    from gemma_tune.models.sources.download import demo_path

    found = {}
    for name in _CONTENDERS.value:
        if name == "keras_hub":
            found[name] = Contender("answer_keras_hub", _MODEL.value)
        elif name != "transformers":
            found[name] = Contender("answer_ours", _MODEL.value, *([] if name == "float32" else [name]))
        elif _MODEL.value == "demo" and installed(["peft_torch"]):
            found[name] = Contender("answer_transformers", demo_path())
        else:
            print("transformers is left out: it isn't installed, or the model isn't `demo`.", file=sys.stderr)
    return found


def tasks() -> dict[str, dict[str, Any]]:
    """Returns what is asked, by name."""
    from gemma_tune.models.load import load_tokenizer

    tokenizer, _ = load_tokenizer(_MODEL.value)
    text = " ".join(example.answer for example in documents()[:40])
    ids = tokenizer.encode(text)
    starts = [211 * index for index in range(len(_EIGHT_PROMPTS))]
    eight = [[tokenizer.bos_id, *ids[at : at + size - 1]] for at, size in zip(starts, _EIGHT_PROMPTS, strict=True)]
    one = [[tokenizer.bos_id, *ids[5000 : 5000 + _PROMPT_TOKENS - 1]]]
    return {
        "first": {"prompts": one, "num_new": [1], "together": False},
        "whole": {"prompts": one, "num_new": [_NUM_NEW.value], "together": False},
        "together": {"prompts": eight, "num_new": list(_EIGHT_ANSWERS), "together": True},
        "in_turn": {"prompts": eight, "num_new": list(_EIGHT_ANSWERS), "together": False},
    }


def measure(workers: dict[str, Contender]) -> dict[str, dict[str, Any]]:
    """Returns contender -> task -> seconds of each round, and the answers. The first round warms up."""
    asked = tasks()
    found: dict[str, dict[str, Any]] = {who: {"answers": {}, "seconds": {}} for who in workers}
    try:
        for worker in workers.values():
            worker.start()
        for turn in range(_REPEATS.value + 1):
            for who, worker in workers.items():
                for task, request in asked.items():
                    if who in _PEERS and request["num_new"] == list(_EIGHT_ANSWERS):
                        continue
                    said = worker.ask(json.dumps(request))
                    found[who]["answers"][task] = said["answers"]
                    found[who]["peak_bytes"] = said["peak_bytes"]
                    if turn:
                        found[who]["seconds"].setdefault(task, []).append(said["seconds"])
            print(f"round {turn} of {_REPEATS.value}", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.stop()
    return found


def figures_of(measured: dict[str, Any]) -> dict[str, Any]:
    """Returns one contender's figures."""
    seconds = {task: statistics.median(each) for task, each in measured["seconds"].items()}
    figures = {
        "first_token_seconds": seconds["first"],
        "tokens_per_second": (_NUM_NEW.value - 1) / (seconds["whole"] - seconds["first"]),
        "peak_bytes": measured["peak_bytes"],
    }
    if "together" in seconds:
        figures["eight_tokens_per_second"] = sum(_EIGHT_ANSWERS) / seconds["together"]
        figures["eight_against_in_turn"] = seconds["in_turn"] / seconds["together"]
    return figures


def agreement(measured: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Returns what must be equal, and whether it is."""
    found = {}
    if {"float32", "keras_hub"} <= measured.keys():
        ours, theirs = (measured[who]["answers"]["whole"] for who in ("float32", "keras_hub"))
        found["float32 answers as KerasHub does"] = ours == theirs
    for who, each in measured.items():
        if "together" in each["answers"]:
            found[f"{who}: eight at once as one by one"] = each["answers"]["together"] == each["answers"]["in_turn"]
    return found


def verdicts(figures: dict[str, dict[str, Any]]) -> list[Verdict]:
    """Returns (what, figure, what it must be, whether it is)."""
    found = []

    def against(who: str, peer: str, least: float) -> None:
        if who in figures and peer in figures:
            ratio = figures[who]["tokens_per_second"] / figures[peer]["tokens_per_second"]
            found.append((f"{who}: tokens a second, of {peer}'s", ratio, f"≥ {least}", ratio >= least))

    against("float32", "keras_hub", 1.1)
    against("float32", "transformers", 2.0)
    against("int8", "keras_hub", 2.0)
    if "float32" in figures:
        row = figures["float32"]
        ratio, seconds = row["eight_against_in_turn"], row["first_token_seconds"]
        found.append(("float32: eight at once, of one by one", ratio, "≥ 3", ratio >= 3))
        found.append(("float32: seconds to the first token", seconds, "≤ 0.15", seconds <= 0.15))
    return found


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the figures and the verdicts."""
    columns = ("tokens_per_second", "first_token_seconds", "eight_tokens_per_second", "eight_against_in_turn")
    table = Table("", *columns, "peak_bytes", title="Greedy answers", title_justify="left")
    for who, row in result["figures"].items():
        cells = (f"{row[name]:.3f}" if name in row else "" for name in columns)
        table.add_row(who, *cells, f"{row['peak_bytes'] / 1e9:.2f} GB")
    console.print(table)
    for what, is_equal in result["agreement"].items():
        console.print(f"{what}: {'yes' if is_equal else 'no'}")
    console.print(verdict_table(result["verdicts"]))


def main(argv: list[str]) -> None:
    del argv
    measured = measure(contenders())
    figures = {who: figures_of(each) for who, each in measured.items()}
    result = {
        "machine": describe(),
        "figures": figures,
        "seconds": {who: each["seconds"] for who, each in measured.items()},
        "agreement": agreement(measured),
        "verdicts": verdicts(figures),
    }
    show(result, Console(stderr=_JSON.value))
    if _JSON.value:
        print(json.dumps(result))
    if not all([*result["agreement"].values(), *(reached for *_, reached in result["verdicts"])]):
        raise SystemExit(1)


if __name__ == "__main__":
    app.run(main)
