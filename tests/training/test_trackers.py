"""Trackers get each row once, in the same run after a resume, and can neither stop nor slow training."""

import threading
import time
from types import SimpleNamespace

import pytest
from helpers.training_loops import fresh_state, make_loop

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError
from gemma_tune.training.run.checkpoint_content import Progress
from gemma_tune.training.run.metrics import MetricsWriter, read_metrics
from gemma_tune.training.run.trackers import follower
from gemma_tune.training.run.trackers.follower import Followers
from gemma_tune.training.run.trackers.tracker import TrackedRun, find_trackers


class Remembered:
    """A tracker that keeps what it gets, and does what `on_rows` says before it takes rows."""

    def __init__(self, on_rows=lambda: None):
        self.opened, self.rows, self.files, self.ended, self._on_rows = [], [], [], [], on_rows

    def open(self, run):
        self.opened.append(run.id)
        self.id = run.id or f"new-{len(self.opened)}"
        return self

    def log_rows(self, rows):
        self._on_rows()
        self.rows += rows

    def add_files(self, path):
        self.files.append(path)

    def finish(self, has_failed):
        self.ended.append(has_failed)


def follow(path, trackers, num_steps=10, resumed_from=None, fails=False):
    """Runs the loop with trackers; returns the problems that they had."""
    problems = []
    loop, checkpoints = make_loop(path, num_steps, heldout=lambda w: 20 - w)
    state, progress = checkpoints.restore(fresh_state(), resumed_from) if resumed_from else (fresh_state(), Progress())
    openers = {name: tracker.open for name, tracker in trackers.items()}
    run = TrackedRun("mine", path, Config().to_dict())
    with Followers(openers, run, problems.append) as followers:
        loop.metrics = MetricsWriter(path, int(state.step), on_row=followers.wake)
        followers.follow(loop.metrics.rows)
        loop.run(state, progress)
        if fails:
            raise RuntimeError("the run fails")
        followers.add_files([path / "report.html"])
    return problems


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(follower, "_SECONDS_BETWEEN_ROWS", 0.01)


def test_each_row_arrives_once_then_the_files(tmp_path):
    tracker = Remembered()
    assert follow(tmp_path, {"mine": tracker}) == []
    assert tracker.rows == read_metrics(tmp_path) and len(tracker.rows) == 10 + 6
    assert tracker.files == [tmp_path / "report.html"] and tracker.ended == [False]


def test_a_run_that_fails_ends_as_failed_without_files(tmp_path):
    tracker = Remembered()
    with pytest.raises(RuntimeError, match="the run fails"):
        follow(tmp_path, {"mine": tracker}, fails=True)
    assert tracker.rows == read_metrics(tmp_path) and tracker.files == [] and tracker.ended == [True]


def test_a_resumed_run_goes_on_in_the_same_run_without_repeating_rows(tmp_path):
    """It is resumed at step 6, though the tracker had rows up to step 7."""
    first, second = Remembered(), Remembered()
    follow(tmp_path, {"mine": first}, num_steps=7)
    follow(tmp_path, {"mine": second}, num_steps=12, resumed_from=6)
    assert second.opened == ["new-1"]
    assert [row["step"] for row in second.rows] == [8, 8, 9, 10, 10, 11, 12, 12]
    places = [(row["step"], "heldout_loss" in row) for row in first.rows + second.rows]
    assert places == sorted(set(places)) and {step for step, _ in places} == set(range(13))


def test_a_tracker_that_fails_is_left_out_once_and_later_gets_what_it_missed(tmp_path):
    def fail():
        raise ConnectionError("no such host")

    failing, other, later = Remembered(fail), Remembered(), Remembered()
    problems = follow(tmp_path, {"failing": failing, "other": other}, num_steps=7)
    assert len(problems) == 1 and problems[0].startswith("failing gets no more metrics: no such host. The run goes on")
    assert failing.rows == [] and other.rows == read_metrics(tmp_path)
    follow(tmp_path, {"failing": later}, num_steps=9, resumed_from=6)
    assert later.opened == ["new-1"] and later.rows == read_metrics(tmp_path)


def test_a_tracker_that_hangs_neither_slows_nor_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(follower, "_FINISH_SECONDS", 0.3)
    forever = threading.Event()
    hanging, other = Remembered(forever.wait), Remembered()
    start = time.perf_counter()
    problems = follow(tmp_path, {"hanging": hanging, "other": other})
    assert time.perf_counter() - start < 10, "a run of ten steps, and 0.3 seconds of waiting"
    assert len(problems) == 1 and "hanging hasn't answered for 0.3 seconds" in problems[0]
    assert other.rows == read_metrics(tmp_path) and len(other.rows) == 16
    forever.set()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "mlflow" else SimpleNamespace())
    with pytest.raises(
        ConfigError, match=r"report_to=mlflow needs the package mlflow. Run: pip install 'gemma-tune\[ml"
    ):
        find_trackers(("tensorboard", "mlflow"))
    assert list(find_trackers(("tensorboard", "trackio", "wandb", "trackio"))) == ["trackio", "wandb"]


def test_tensorboard_is_written_only_if_wanted(tmp_path):
    for writes in (True, False):
        (tmp_path / str(writes)).mkdir()
        writer = MetricsWriter(tmp_path / str(writes), 0, writes_events=writes)
        writer.write(1, loss=1.0)
        writer.close()
        assert (tmp_path / str(writes) / "tensorboard").exists() is writes
        assert len(read_metrics(tmp_path / str(writes))) == 1


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigError, match="training.report_to must be one of tensorboard.*Did you mean tensorboard"):
        Config().replace({"training.report_to": ("tensorbord",)})
    assert Config().replace({"training.report_to": ""}).training.report_to == ()
