"""The benchmarks run, at their smallest sizes, and say what they promise. Their figures are not looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma_tune.quantization.spec import PTQ_SCHEMES
from gemma_tune.training.losses.loss_scale import FIRST_SCALE

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def run(module, *arguments, code=0):
    """Runs a benchmark as its docstring says, and returns the JSON object that it prints last. code: None: any."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--json"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert code is None or done.returncode == code, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_loss_memory():
    result, _ = run("loss_memory", "--tokens=16", "--vocabularies=4096,10000", "--width=32", "--repeats=1")
    assert [row["head"] for row in result["rows"]] == ["frozen", "frozen", "trained", "trained"]
    for row in result["rows"]:
        assert row["difference"] < 1e-5
        assert min(row[f"{name}_{unit}"] for name in ("fused", "plain") for unit in ("bytes", "seconds")) > 0


def test_loss_memory_does_not_run_what_does_not_fit():
    result, _ = run("loss_memory", "--tokens=16", "--vocabularies=4096", "--width=32", "--repeats=1", "--free_bytes=9")
    for row in result["rows"]:
        assert row["plain_bytes"] > 9 and row["plain_seconds"] is None and row["difference"] is None


@pytest.mark.nightly
def test_scaling(tmp_path):
    result, _ = run(
        "scaling", "--quick", "--axes=batch", "--repeats=1", "--remat=none", f"--plot={tmp_path}/growth.png"
    )
    assert [point["batch"] for point in result["batch"]["points"]] == [1, 2, 4]
    fits = result["batch"]["fits"]
    assert set(fits) == {"temporary_bytes", "state_bytes", "seconds"}
    # XLA's own count, so the same on every machine: linear, and the state doesn't grow.
    assert fits["temporary_bytes"]["is_as_claimed"] and fits["temporary_bytes"]["exponent"] > 0.9
    assert fits["state_bytes"]["exponent"] == pytest.approx(0.0, abs=1e-9)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.nightly
def test_precision_tiny():
    arguments = ("--model=tiny", "--steps=5", "--window=2", "--job=chats", "--num_examples=8", "--row_length=64")
    result, _ = run("precision", *arguments)
    assert list(result["runs"]) == ["float32", "mixed_float16", "mixed_bfloat16"] and result["is_reached"]
    for precision, row in result["runs"].items():
        assert len(row["losses"]) == 5 and len(row["windows"]) == 3 and row["seconds_per_step"] > 0
        assert row["num_skipped_steps"] == 0 and (row["loss_scale"] == FIRST_SCALE) == (precision == "mixed_float16")
    assert result["runs"]["float32"]["deviation"] == 0 < result["runs"]["mixed_float16"]["deviation"]


def test_deviations_are_of_running_means():
    from benchmarks.precision import compare, running_mean

    np.testing.assert_allclose(running_mean([1, 2, 3, 6], 2), [1.5, 2.5, 4.5])
    np.testing.assert_allclose(running_mean([1, 2], 20), [1.5])
    runs = {"float32": {"losses": [1.0, 1.0, 1.0, 1.0]}, "other": {"losses": [1.0, 1.1, 0.9, 1.2]}}
    compare(runs, 2)
    assert runs["other"]["windows"] == pytest.approx([1.05, 1.05])
    assert (runs["float32"]["deviation"], runs["other"]["deviation"]) == pytest.approx((0, 0.05))


def test_gpu_says_that_there_is_none():
    result, said = run("gpu", code=1)
    assert result == {"gpu": None} and "No GPU" in said


@pytest.mark.nightly
def test_gpu_tiny():
    arguments = ("--runs=ours", "--num_examples=4", "--batch_size=1", "--repeats=1", "--remat=none")
    result, _ = run("gpu", "--tiny", *arguments)
    assert result["gpu"] is None and result["left_out"] == []
    row = result["tiny"]["ours"]
    assert min(row[key] for key in ("tokens_per_second", "share_of_matmul", "peak_bytes", "weight_bytes")) > 0
    assert row["loss"] == pytest.approx(np.log(1024), rel=0.05)  # Random weights know nothing.


@pytest.mark.nightly
def test_qat():
    result, said = run("qat", "--model=tiny", "--steps=2", "--block_size=32", "--max_length=128")
    assert min(result[key] for key in ("float_loss", "rounded_loss", "qat_loss", "qat_step_seconds")) > 0
    assert result["must"] == 0.6 and "int4, trained so" in said


def test_a_fit_finds_the_growth():
    from benchmarks.fit import growth

    x = [1, 2, 4, 8]
    linear = growth(x, [7 + 3 * each for each in x], 1)
    assert (linear.constant, linear.slope, linear.r_squared) == pytest.approx((7, 3, 1))
    assert linear.is_as_claimed and linear.last_exponent < 1
    assert growth(x, [each**1.5 for each in x], 2).exponent == pytest.approx(1.5)
    assert not growth(x, [each**1.5 for each in x], 1).is_as_claimed
    # What is constant hides the growth from the fit through all points, but not from the last two.
    hidden = growth([1, 4, 16, 32, 64], [1000 + each**2 for each in (1, 4, 16, 32, 64)], 1)
    assert hidden.exponent < 1 and not hidden.is_as_claimed


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("gemma3_270m", "gemma3_270m"),
        ("gemma3_1b", "gemma3_1b"),
        ("gemma3_4b", "gemma3_4b_text"),
        ("gemma2_2b", "gemma2_2b_en"),
    ],
)
def test_shapes_are_those_of_the_presets(name, preset):
    """As many parameters as KerasHub says, and as the count of least operations assumes."""
    from benchmarks.random_model import arguments
    from benchmarks.shapes import SHAPES
    from gemma_tune.models.family import FAMILIES
    from gemma_tune.models.sources.lazy_initialization import lazy_initialization
    from gemma_tune.models.sources.preset_catalog import presets

    shape = SHAPES[name]
    with lazy_initialization():
        backbone = FAMILIES[shape.family].causal_lm.backbone_cls(dtype="bfloat16", **arguments(shape))
    sizes = {variable.path: int(np.prod(variable.shape)) for variable in backbone.variables}
    assert sum(sizes.values()) == next(each.num_params for each in presets() if each.name == preset)
    kernels = sum(size for path, size in sizes.items() if path.endswith("kernel"))
    assert kernels == shape.linear_parameters


def test_a_job_has_examples_of_all_lengths(tiny_tokenizer):
    from benchmarks.jobs import job

    few, many = (job("chats", count, tiny_tokenizer) for count in (20, 300))
    assert few.num_tokens / 20 == pytest.approx(many.num_tokens / 300, rel=0.02)
    assert job("chats", 20, tiny_tokenizer).num_targets == few.num_targets
    with pytest.raises(ValueError, match=r"1000 examples were asked for; there are \d+\."):
        job("chats", 1000, tiny_tokenizer)


@pytest.mark.nightly
def test_quantization_on_the_tiny_model():
    arguments = ("--model=tiny", "--steps=3", "--repeats=1", "--num_documents=3", "--tokens=600", "--heldout=4")
    done, _ = run("quantization", *arguments, "--schemes=int8,nf4", "--parts=learning,rounding", code=None)
    # Random weights magnify roundings: what must be reached is for real ones.
    assert done["learning"]["int8"]["least_cosine"] > 0.99 > done["learning"]["nf4"]["least_cosine"] > 0.5
    assert set(done["rounding"]) == {"float32", *PTQ_SCHEMES}
    losses = {what: is_reached for what, *_, is_reached in done["verdicts"] if "of LoRA's" in what}
    assert len(losses) == 2 and all(losses.values())


def test_fuzz(tmp_path):
    """A few of the inputs; `python -m benchmarks.fuzz` reads 100,000."""
    result, _ = run("fuzz", "--num_inputs=600", f"--keep={tmp_path / 'failures'}")
    assert result["num_inputs"] == 600 and result["num_failed"] == 0, result["runs"]
    for counts in result["runs"].values():
        assert counts["read"] > 0 and counts["refused"] > 10  # Control: the damage is met.


def test_fuzz_sees_what_fails(monkeypatch, tmp_path):
    """Controls: errors that are not ours, hanging, and taking too much memory."""
    import signal
    import time
    import tracemalloc

    from benchmarks import fuzz_readers as fuzz

    monkeypatch.setattr(fuzz, "_SECONDS", 0.2)
    previous = signal.signal(signal.SIGALRM, fuzz.too_long)
    tracemalloc.start()
    try:
        reads = [lambda path: 1 / 0, lambda path: time.sleep(5), lambda path: bytearray(20_000_000), lambda path: None]
        found = [fuzz.try_one(fuzz.Reader("", [], read), tmp_path, 100) for read in reads]
    finally:
        tracemalloc.stop()
        signal.signal(signal.SIGALRM, previous)
    assert [result for result, _ in found] == ["failed", "failed", "failed", "read"]
    assert ["ZeroDivision" in found[0][1], "Timeout" in found[1][1], "20.0 MB" in found[2][1]] == [True] * 3


@pytest.mark.nightly
def test_faults():
    result, _ = run("faults", "--model=tiny", "--num_seeds=1", "--pairs=1", "--window=2")
    assert result["kills"]["differing"] == [] and result["kills"]["num_kills"] > 0
    assert result["saving"]["bytes"] > 0 and result["resume"]["resume_seconds"] > 0


@pytest.mark.nightly
def test_structured():
    result, _ = run("structured", "--cost_model=tiny", "--cost_tokens=8", "--repeats=1", code=None)
    assert result["answers that follow their schema"] == 200
    assert result["programs compiled after the start"] == 0
    assert result["1 at once: time of a constrained token, of a free"] > 0


@pytest.mark.nightly
def test_serving_tiny():
    arguments = ("--model=tiny", "--contenders=float32,int8,keras_hub", "--repeats=1")
    result, _ = run("serving", *arguments, code=None)  # A tiny model's time says nothing of a real one's.
    assert set(result["figures"]) == {"float32", "int8", "keras_hub"}
    assert result["agreement"] and all(result["agreement"].values())
    assert all(row["tokens_per_second"] > 0 for row in result["figures"].values())


@pytest.mark.nightly
@pytest.mark.peers
def test_lm_eval_tiny():
    pytest.importorskip("lm_eval")
    arguments = ("--model=tiny", "--questions=12", "--repeats=1", "--hf_batch_sizes=1,4")
    result, _ = run("lm_eval", *arguments, code=None)  # A tiny model's time says nothing of a real one's.
    assert set(result["figures"]) == {"ours", "hf, batch size 1", "hf, batch size 4"}
    assert result["compared"]["other_choices_beyond_rounding"] == 0
    assert result["compared"]["largest_difference_nats"] < 1e-2
