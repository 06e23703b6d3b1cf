"""A run's result and report come from memory, not from files that a full disk leaves short."""

import json

import pytest

from gemma_tune import Config, pipeline
from gemma_tune.training.run.metrics import MetricsWriter, read_metrics


@pytest.fixture
def config(tmp_path):
    return Config().replace({
        "workdir": str(tmp_path / "run"), "model.source": "tiny", "data.max_length": 64, "training.batch_size": 4,
        "training.num_train_steps": 3, "training.eval_every_steps": 2, "training.num_sample_answers": 0,
        "training.num_scored_answers": 0,
    })  # fmt: skip


@pytest.mark.parametrize("ends_full", [True, False], ids=["full to the end", "room at the end"])
def test_result_and_report_are_right_though_metrics_could_not_be_written(config, tmp_path, monkeypatch, ends_full):
    """Each row is tried, and fails; closing tries once more."""
    written, append, close = {}, MetricsWriter._append, MetricsWriter.close
    write = MetricsWriter.write

    def remember(writer, step, **values):
        if "heldout_loss" in values:
            written[step] = {name.removeprefix("heldout_"): value for name, value in values.items()}
        write(writer, step, **values)

    def fail(writer):
        raise OSError(28, "No space left on device")

    def close_with_room(writer):
        with monkeypatch.context() as patched:
            patched.setattr(MetricsWriter, "_append", fail if ends_full else append)
            close(writer)

    monkeypatch.setattr(MetricsWriter, "write", remember)
    monkeypatch.setattr(MetricsWriter, "_append", fail)
    monkeypatch.setattr(MetricsWriter, "close", close_with_room)
    result = pipeline.run_training(config)
    assert written.keys() == {0, 2, 3} and result.best_step in (2, 3)
    assert result.before == written[0] and result.after == written[result.best_step]
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved["heldout_before"] == written[0] and saved["heldout_after"] == written[result.best_step]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in report and format(written[0]["loss"], ".4f") in report
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == ([] if ends_full else [0, 1, 2, 2, 3, 3])


def test_a_mixture_is_trained_and_the_loss_of_each_source_is_reported(config, write, tmp_path):
    rows = [json.dumps({"prompt": f"Where is shelf {i}?", "completion": f"In hall {i % 7}."}) for i in range(40)]
    chats = write("chats.jsonl", "\n".join(rows))
    book = write(
        "book.jsonl", "\n".join(json.dumps({"text": f"Chapter {i}. " + "The gull flew on. " * 30}) for i in range(6))
    )
    changed = {
        "data.source": f"{chats}:1,{book}:3", "data.eval_fraction": 0.3, "training.eval_metrics": ("f1",),
        "training.num_eval_answers": 2, "generation.max_new_tokens": 3,
    }  # fmt: skip
    result = pipeline.run_training(config.replace(changed))
    losses = {name: value for name, value in result.after.items() if name.startswith("loss/")}
    assert losses.keys() == {"loss/chats.jsonl", "loss/book.jsonl"}
    assert min(losses.values()) < result.after["loss"] < max(losses.values())
    sources = result.data.sources
    assert [source["num_rows"] for source in sources] == [40, 6]
    assert sum(source["num_heldout"] for source in sources) == result.data.num_heldout
    assert result.data.num_cut_up == 6 and result.data.num_tokens_lost == 0
    report = (tmp_path / "run" / "report.html").read_text()
    for text in ("<h3>Sources</h3>", str(book), *(f"{loss:.4f}" for loss in losses.values()), "documents in pieces"):
        assert text in report
