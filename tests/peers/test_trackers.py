"""MLflow, Trackio and Weights & Biases give back what a run reported: `pip install -e '.[peers]'`, `pytest -m peers`.

Each stores in a folder of the test, and nothing leaves the machine.
"""

import json
import struct
import sys

import pytest
from helpers.skips import needs

from gemma_tune.config import Config
from gemma_tune.settings import flatten
from gemma_tune.training.run.metrics import MetricsWriter
from gemma_tune.training.run.trackers.follower import Followers
from gemma_tune.training.run.trackers.tracker import TrackedRun, find_trackers

pytestmark = pytest.mark.peers
CONFIG = Config(seed=7)
_BLOCK, _FULL, _LAST = 32768, 1, 4  # Of LevelDB's log format.


def report(workdir, tracker, steps, resumed_step=0):
    """Reports steps as training does, and a report at the end; returns the problems."""
    workdir.mkdir(exist_ok=True)
    (workdir / "report.html").write_text("<html>the report</html>")
    problems = []
    with Followers(
        find_trackers([tracker]), TrackedRun("mine", workdir, CONFIG.to_dict()), problems.append
    ) as trackers:
        metrics = MetricsWriter(workdir, resumed_step, writes_events=False, on_row=trackers.wake)
        trackers.follow(metrics.rows)
        for step in steps:
            metrics.write(step, loss=1 / step, learning_rate=0.1 * step)
            if step % 2 == 0:
                metrics.write(step, heldout_loss=2 / step, heldout_f1=step / 10)
        metrics.close()
        trackers.add_files([workdir / "report.html"])
    return problems


def report_and_resume(workdir, tracker):
    """A run of five steps that is resumed at step 4 and goes on to step 6; another one of the same name in between."""
    assert report(workdir, tracker, range(1, 6)) == []
    assert report(workdir.with_name("other"), tracker, range(1, 3)) == []
    assert report(workdir, tracker, range(5, 7), resumed_step=4) == []
    return json.loads((workdir / "trackers.json").read_text())[tracker]["id"]


LOSSES = [(step, pytest.approx(1 / step)) for step in range(1, 7)]
F1S = [(2, pytest.approx(0.2)), (4, pytest.approx(0.4)), (6, pytest.approx(0.6))]


@needs("mlflow", "peers")
def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # Artifacts are stored in mlruns/ of the current folder.
    run_id = report_and_resume(tmp_path / "mine", "mlflow")
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("gemma_tune").experiment_id
    assert len(client.search_runs([experiment])) == 2
    run = client.get_run(run_id)
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    assert run.data.params == {path: str(value) for path, value in flatten(CONFIG.to_dict()).items()}
    for name, wanted in (("loss", LOSSES), ("heldout_f1", F1S)):
        assert [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)] == wanted
    folder = client.download_artifacts(run_id, "", str(tmp_path))
    assert [path.path for path in client.list_artifacts(run_id)] == ["report.html"] and folder


@needs("trackio", "peers")
def test_trackio(tmp_path, monkeypatch, capfd):
    assert "trackio" not in sys.modules, "it reads its folder from the environment when it is imported"
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    run_id = report_and_resume(tmp_path / "mine", "trackio")
    assert capfd.readouterr().out == "", "stdout is for the command's result"
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    runs = {run.id: run for run in trackio.Api().runs("gemma_tune")}
    assert len(runs) == 2 and runs[run_id].name == "mine"
    config = {name: value for name, value in runs[run_id].config.items() if not name.startswith("_")}
    assert config == flatten(CONFIG.to_dict())
    rows = SQLiteStorage.get_logs("gemma_tune", "mine", run_id=run_id)
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == LOSSES
    assert [(row["step"], row["heldout_f1"]) for row in rows if "heldout_f1" in row] == F1S


@pytest.fixture
def fresh_wandb():
    """wandb reads its environment once, when it is set up."""
    import wandb

    wandb.teardown()
    yield
    wandb.teardown()


@needs("wandb", "peers")
def test_wandb_offline(fresh_wandb, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_id = report_and_resume(tmp_path / "mine", "wandb")
    assert capfd.readouterr().out == ""
    folders = sorted((tmp_path / "mine" / "wandb").glob(f"offline-run-*-{run_id}*"))
    assert len(folders) == 2, "the resumed run has the same ID, so that `wandb sync --append` joins them"
    rows = [row for folder in folders for row in wandb_history(next(folder.glob("*.wandb")))]
    assert [(row["_step"], row["loss"]) for row in rows if "loss" in row] == LOSSES
    assert [(row["_step"], row["heldout_f1"]) for row in rows if "heldout_f1" in row] == F1S
    names = {path.name for folder in folders for path in (folder / "files").iterdir()}
    assert names <= {"report.html", "config.yaml", "wandb-summary.json"}, "nothing that nobody asked for"
    assert (folders[0] / "files" / "report.html").read_text() == "<html>the report</html>"


@needs("wandb", "peers")
def test_wandb_without_a_key_is_left_out(fresh_wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    problems = report(tmp_path / "mine", "wandb", range(1, 3))
    assert len(problems) == 1 and "there is no API key. Run `wandb login`" in problems[0]


def wandb_history(path):
    """Returns the rows of metrics in the file of an offline run: LevelDB's log format with a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, start, parts, rows = path.read_bytes(), 7, [], []
    while start < len(data):
        if _BLOCK - start % _BLOCK < 7:  # No record begins in the last bytes of a block.
            start += _BLOCK - start % _BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, start + 4)  # After a checksum.
        parts.append(data[start + 7 : start + 7 + length])
        start += 7 + length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return rows
