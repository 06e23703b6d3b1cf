"""`gemma-tune quantize` and `merge`: from a run to a preset that every verb takes, or one message and nothing written."""

import json

import numpy as np
import pytest
from helpers.cli_arguments import FAST, TINY

from gemma_tune.models.functional import parameters
from gemma_tune.models.load import load_model
from gemma_tune.quantization.spec import PTQ_SCHEMES


@pytest.mark.parametrize(
    "scheme", ["int4", *(pytest.param(s, marks=pytest.mark.nightly) for s in PTQ_SCHEMES if s != "int4")]
)
def test_every_scheme_of_a_run(call, trained, tmp_path, scheme):
    """LoRA merged, saved, loaded again by another verb, and smaller."""
    output = tmp_path / "preset"
    calibration = ["--calibration=sample:smartphone_support"] if PTQ_SCHEMES[scheme].method else []
    code, out, err = call(
        "quantize", f"--model={trained}", f"--scheme={scheme}", f"--output={output}", "--block_size=32",
        "--calibration_tokens=600", "--max_length=128", *calibration, "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    most = 0.29 if PTQ_SCHEMES[scheme].scheme == "int8" else 0.2
    assert 0 < result["bytes"] < most * result["float_bytes"]
    assert bool(result["errors"]) == bool(PTQ_SCHEMES[scheme].method)
    assert not list(tmp_path.glob("*.partial"))
    code, out, err = call("generate", f"--model={output}", "--max_new_tokens=3", "How do I reset my phone?")
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--scheme=int5", "--output=o"], 2, "--scheme must be one of"),
        (["--scheme=int8"], 2, "--output=… is missing"),
        (["--scheme=gptq-int4", "--output=o"], 2, "needs --calibration=DATA"),
        (["--scheme=gptq-int4", "--output=o", "--calibration=few.jsonl"], 1, "tokens for calibration"),
        (["--scheme=awq-int4", "--output=o", "--calibration=none.jsonl"], 1, "none.jsonl"),
        (["--scheme=int4", "--output=o", "--block_size=48"], 2, "model.block_size must be one of"),
        (["--scheme=int4", "--output=o", "--block_size=256"], 1, "block_size=256 does not divide its"),
        (["--scheme=int8", "--output=taken"], 1, "exists already"),
    ],
)
def test_mistakes_write_nothing(call, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    row = {"prompt": "How do I switch it on?", "completion": "Hold the key."}
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({**row, "prompt": f"{i}?"}) + "\n" for i in range(4)))
    (tmp_path / "none.jsonl").write_text("")
    found, _, err = call("quantize", "--model=tiny", "--max_length=128", *arguments)
    assert found == code and message in err and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.jsonl", "none.jsonl", "taken"]


def test_layers_that_do_not_fit_take_int8_if_asked(call, tmp_path):
    code, out, err = call(
        "quantize", "--model=tiny", "--scheme=int4", "--block_size=256", "--or_int8", f"--output={tmp_path}/o", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["num_int8"] > 0
    schemes = {
        one["quant_spec"]["scheme"]
        for one in json.loads((tmp_path / "o/quantization.json").read_text())["layers"].values()
    }
    assert "int8" in schemes


@pytest.mark.nightly
def test_qlora_is_merged_into_the_floats_it_came_from(call, tmp_path):
    """The base is read again unquantized: nothing but LoRA is between it and the merged weights. Into codes, the error
    of rounding is said. All weights of what is quantized can't be trained.
    """
    run = tmp_path / "run"
    code, out, err = call(
        "train", *TINY, *FAST, f"--workdir={run}", "--data=sample:smartphone_support", "--method=qlora",
        "--quantize=nf4", "--block_size=32", "--config.training.num_train_steps=3",
    )  # fmt: skip
    assert code == 0, err
    assert call("merge", f"--model={run}", f"--output={tmp_path}/floats")[0] == 0
    merged, base, tuned = (load_model(str(source)) for source in (tmp_path / "floats", "tiny", run))
    update = {path: np.asarray(value) for path, value in parameters(tuned).trainable.items()}
    for path, value in parameters(base).trainable.items():
        found = np.asarray(parameters(merged).trainable[path])
        stem = path.rsplit("/", 1)[0]
        if f"{stem}/lora_kernel_a" in update:
            value = value + update[f"{stem}/lora_kernel_a"] @ update[f"{stem}/lora_kernel_b"]
        np.testing.assert_allclose(found, value, rtol=1e-6, atol=1e-7, err_msg=path)
    code, out, err = call("merge", f"--model={run}", f"--output={tmp_path}/codes", "--into=codes", "--json")
    assert code == 0, err
    errors = json.loads(out)["errors"]
    assert errors and all(0 < error["of_weights"] < 0.2 for error in errors)
    code, out, err = call(
        "train", *TINY, f"--model={tmp_path}/codes", "--method=full", f"--workdir={tmp_path}/full",
        "--data=sample:smartphone_support",
    )  # fmt: skip
    assert code == 1 and "can't all be trained" in err and "qlora" in err


def test_merging_what_has_no_lora(call, tmp_path):
    code, _, err = call("merge", "--model=tiny", f"--output={tmp_path}/o")
    assert code == 2 and "no LoRA to merge" in err and not list(tmp_path.iterdir())
