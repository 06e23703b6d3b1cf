"""Reports a run to Weights & Biases, or to files for `wandb sync` where WANDB_MODE is `offline`."""

import os
from collections.abc import Sequence
from pathlib import Path

from gemma_tune.errors import TrainingError
from gemma_tune.training.run.trackers.tracker import PROJECT, Row, TrackedRun, values_of

_FINISH_SECONDS = 60.0  # Uploads that take longer are left to `wandb sync`.


class WandbRun:
    """A run in the project that WANDB_PROJECT names, or `gemma_tune`. Its files are in `wandb/` of the workdir.

    Args:
        run: The run.

    Raises:
        TrainingError: Nobody is logged in. wandb would ask for a key on the terminal.
    """

    def __init__(self, run: TrackedRun):
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise TrainingError("there is no API key. Run `wandb login`, or set WANDB_MODE=offline")
        # Only what is asked for: no code, no output of the program, nothing about the machine.
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            silent=True,
            finish_timeout=_FINISH_SECONDS,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.id or None,
            resume="allow" if run.id else None,
            config=dict(run.settings),
            dir=str(run.workdir),
            settings=settings,
        )
        self.id = self._run.id

    def log_rows(self, rows: Sequence[Row]) -> None:
        """Logs metrics by their step."""
        for row in rows:
            self._run.log(values_of(row), step=row["step"])

    def add_files(self, path: Path) -> None:
        """Saves a file, or the files of a folder, among the run's files."""
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            self._run.save(str(file), base_path=str(path.parent), policy="now")

    def finish(self, has_failed: bool) -> None:
        """Waits for uploads, and ends the run."""
        self._run.finish(exit_code=int(has_failed))
