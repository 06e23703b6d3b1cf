"""Calibrates the assumed utilization of hardware with a measured run."""

import statistics
from pathlib import Path

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError
from gemma_tune.mesh import MeshShape
from gemma_tune.planning.abstract_train_state import abstract_train_state
from gemma_tune.planning.duration import planned_step
from gemma_tune.planning.hardware import Hardware
from gemma_tune.training.run.metrics import read_metrics

_WARM_UP_STEPS = 1  # The first step also compiles.


def calibrated(hardware: Hardware, config: Config, shape: MeshShape, target_share: float, seconds: float) -> Hardware:
    """Returns the hardware with the utilization (`mfu`) that a measured step reached.

    Args:
        hardware: Chip that the step ran on.
        config: Settings of the run.
        shape: Mesh of the run.
        target_share: Share of all positions that have a loss.
        seconds: Duration of one step.

    Raises:
        ConfigError: The step was faster than the hardware can be.
    """
    step = planned_step(abstract_train_state(config, shape, target_share), hardware._replace(mfu=1.0))
    mfu = step.compute_seconds / max(seconds - step.exposed_seconds, 1e-9)
    if not 0 < mfu <= 1:
        raise ConfigError(
            f"A step of {seconds:.3g} s can't have run on {hardware.name}, where its arithmetic alone takes at least "
            f"{step.compute_seconds:.3g} s. Set --hardware to the hardware of that run."
        )
    return hardware._replace(mfu=mfu)


def calibrated_by_run(hardware: Hardware, workdir: Path, config: Config, shape: MeshShape) -> Hardware:
    """Returns the hardware with the utilization (`mfu`) that a run on it reached, by the run's metrics.

    Args:
        hardware: Chip that the run was on.
        workdir: Workdir of the run.
        config: Settings of the run.
        shape: Mesh of the run.

    Raises:
        ConfigError: The run has fewer than two steps.
    """
    rows = [row for row in read_metrics(workdir) if "step_seconds" in row][_WARM_UP_STEPS:]
    if not rows:
        raise ConfigError(
            f"{workdir} has metrics of fewer than two steps, too few to calibrate with. Train there first."
        )
    seconds = statistics.median(row["step_seconds"] for row in rows)
    num_positions = config.training.batch_size * config.row_length
    target_share = statistics.median(row["num_target_tokens"] for row in rows) / num_positions
    return calibrated(hardware, config, shape, target_share, seconds)
