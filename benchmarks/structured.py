"""JSON answers: how many follow their schema, and what a constrained token costs.

    python -m benchmarks.structured [--model=tiny] [--num_schemas=200] [--max_tokens=400] [--cost_model=demo] [--json]

Validity: different random schemas, asked of the serving engine at temperature 1, several at once. Each answer must be
JSON that the package jsonschema finds valid, and the engine must compile nothing after its start. With --model=tiny the
weights are random, so nothing but the grammar keeps an answer in form.

Cost: seconds a token of an answer with a grammar that allows any text of letters and spaces, beside those of an answer
of as many tokens without one; the two take turns, and the median of --repeats rounds counts. Such a text has no forced
token, and each token has a mask. --cost_model= leaves it out.
"""

import json
import random
import statistics
import sys
import time
from typing import Any

from absl import app, flags

from benchmarks.json_schemas import random_schema
from benchmarks.verdicts import Verdict, exit_with

_MODEL = flags.DEFINE_string("model", "tiny", "The model whose answers are checked.")
_NUM_SCHEMAS = flags.DEFINE_integer("num_schemas", 200, "Number of schemas.", lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 400, "Longest answer, in tokens.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the schemas and the answers.")
_COST_MODEL = flags.DEFINE_string("cost_model", "demo", "The model whose tokens are timed; empty: none.")
_COST_TOKENS = flags.DEFINE_integer("cost_tokens", 96, "Tokens of a timed answer.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")
_AT_ONCE = (1, 4)
_ANY_LETTERS = "start: /[a-zA-Z ]+/"


def started_engine(model: str, max_length: int) -> tuple[Any, Any]:
    """Returns a started engine and the prompt encoder of its model."""
    from gemma_tune.models.load import load_model
    from gemma_tune.serving.engine.engine import Engine
    from gemma_tune.serving.prompt_encoder import prompt_encoder_of

    loaded = load_model(model)
    engine = Engine(
        loaded, max_concurrent=4, max_tokens_in_flight=4 * max_length, max_length=max_length, max_queued=10**6
    )
    engine.start()
    return engine, prompt_encoder_of(loaded)


def answers(engine: Any, requests: list[Any]) -> list[tuple[str, str]]:
    """Returns (text, finish_reason) of each request; all are asked at once."""
    deltas: list[list[Any]] = [[] for _ in requests]
    handles = [engine.submit(request, each.append) for request, each in zip(requests, deltas, strict=True)]
    for handle in handles:
        handle.done.wait()
    return [("".join(delta.text for delta in each), each[-1].finish_reason) for each in deltas]


def check_validity() -> dict[str, Any]:
    """Returns how many answers follow their schema, and those that don't."""
    import jsonschema

    from gemma_tune.serving.engine.request import Request
    from gemma_tune.serving.sampling import Sampling

    engine, encoder = started_engine(_MODEL.value, 64 + _MAX_TOKENS.value)
    rng = random.Random(_SEED.value)
    schemas: dict[str, dict[str, Any]] = {}
    while len(schemas) < _NUM_SCHEMAS.value:
        schema = random_schema(rng)
        schemas[json.dumps(schema)] = schema
    asked = [
        Request(
            tuple(encoder.encode("Where is Emma?")),
            _MAX_TOKENS.value,
            Sampling(temperature=1.0),
            _SEED.value + index,
            encoder.stop_ids,
            constraint=encoder.grammars.of_json_schema(schema),
        )
        for index, schema in enumerate(schemas.values())
    ]
    found = answers(engine, asked)
    wrong = []
    for schema, (text, reason) in zip(schemas.values(), found, strict=True):
        try:
            jsonschema.validate(json.loads(text), schema)
        except (ValueError, jsonschema.ValidationError) as error:
            wrong.append({"schema": schema, "text": text, "finish_reason": reason, "error": str(error)[:200]})
    result = {
        "num_schemas": len(schemas),
        "num_valid": len(schemas) - len(wrong),
        "num_cut_short": sum(reason == "length" for _, reason in found),
        "compilations": engine.stats.compilations_since_start,
        "wrong": wrong,
    }
    engine.close()
    return result


def measure_cost() -> dict[str, dict[str, float]]:
    """Returns seconds a token, constrained and free, for each number of answers at once."""
    from gemma_tune.serving.engine.request import Request
    from gemma_tune.serving.sampling import Sampling

    engine, encoder = started_engine(_COST_MODEL.value, 64 + _COST_TOKENS.value)
    constraint = encoder.grammars.of_rules(_ANY_LETTERS)
    prompt = tuple(encoder.encode("Where is Emma?"))
    # No stop tokens, and a bias against those of the grammar: all answers have the same length.
    sampling, unending = Sampling(temperature=1.0), tuple((token, -100.0) for token in encoder.stop_ids)
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(_REPEATS.value + 1):
        for at_once in _AT_ONCE:
            for name, grammar in (("free", None), ("constrained", constraint)):
                free = Request(prompt, _COST_TOKENS.value, sampling, turn, ())
                request = free._replace(
                    constraint=grammar, changes=free.changes._replace(bias=unending) if grammar else free.changes
                )
                started = time.perf_counter()
                answers(engine, [request._replace(seed=seed) for seed in range(at_once)])
                seconds = (time.perf_counter() - started) / _COST_TOKENS.value
                if turn:
                    found.setdefault(str(at_once), {}).setdefault(name, []).append(seconds)
    engine.close()
    return {
        at_once: {name: statistics.median(each) for name, each in rates.items()} for at_once, rates in found.items()
    }


def main(argv: list[str]) -> None:
    del argv
    checked = check_validity()
    for wrong in checked["wrong"]:
        print(json.dumps(wrong, ensure_ascii=False), file=sys.stderr)
    count, valid = checked["num_schemas"], checked["num_valid"]
    verdicts: list[Verdict] = [
        ("answers that follow their schema", valid, f"{count} of {count}", valid == count),
        ("of them cut short by max_tokens", checked["num_cut_short"], "-", True),
        ("programs compiled after the start", checked["compilations"], "0", checked["compilations"] == 0),
    ]
    if _COST_MODEL.value:
        for at_once, seconds in measure_cost().items():
            ratio = seconds["constrained"] / seconds["free"]
            verdicts.append(
                (f"{at_once} at once: time of a constrained token, of a free", ratio, "≤ 1.1", ratio <= 1.1)
            )
    exit_with(verdicts, _JSON.value)


if __name__ == "__main__":
    app.run(main)
