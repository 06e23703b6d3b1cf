"""`gemma-tune plan` as a user types it."""

import json

from gemma_tune.training.run.metrics import read_metrics


def test_it_prints_memory_time_and_cost(call):
    code, out, _ = call(
        "plan", "--model=gemma3_27b", "--hardware=v5e,h100", "--mesh=fsdp:16", "--batch_size=16", "--precision=bfloat16"
    )
    assert code == 0
    for text in ("total", "16 × v5e", "16 × h100", "max rows", "gemma-tune train --model=gemma3_27b"):
        assert text in out


def test_json_has_what_the_table_has(call):
    code, out, _ = call("plan", "--model=gemma3_12b", "--precision=bfloat16", "--price=2", "--num_tokens=2e6", "--json")
    assert code == 0
    (plan,) = json.loads(out)["plans"]
    assert plan["hardware"]["dollars_per_hour"] == 2 and not plan["fits"] and plan["max_batch_size"] == 0
    assert plan["dollars"] == 2e6 / plan["tokens_per_second"] / 3600 * 2
    parts = ("weights", "optimizer_state", "activations", "gradients", "workspace")
    assert plan["memory"]["total"] == sum(plan["memory"][part] for part in parts)


def test_a_run_calibrates_it(call, trained):
    """On this machine: the run's own plan is then the time that its steps took."""
    code, out, _ = call("plan", f"--config={trained}", "--hardware=cpu", f"--calibrate={trained}", "--json")
    assert code == 0
    rows = [row for row in read_metrics(trained) if "step_seconds" in row][1:]
    seconds = sorted(row["step_seconds"] for row in rows)
    (plan,) = json.loads(out)["plans"]
    assert seconds[0] * 0.5 < plan["step"]["seconds"] < seconds[-1] * 2  # Its share of targets is not the run's.


def test_mistakes_say_what_to_do(call, tmp_path):
    for arguments, text in (
        (["--hardware=v5q"], "Did you mean v5"),
        (["--model=gemma3_4b", "--mesh=fsdp:3"], "must be a multiple of that"),
        (["--model=tiny", "--mesh=fsdp:2", "--num_devices=4"], "needs 2 devices"),
        (["--model=tiny", "--hardware=v5e,t4", f"--calibrate={tmp_path}"], "needs one --hardware"),
    ):
        code, _, err = call("plan", *arguments)
        assert code == 2 and text in err and "Traceback" not in err
