"""What hardware reaches in fact, from a run that was on it."""

import statistics
from pathlib import Path

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError
from gemma_tune.mesh import MeshShape
from gemma_tune.planning.abstract_train_state import abstract_train_state
from gemma_tune.planning.duration import planned_step
from gemma_tune.planning.hardware import Hardware
from gemma_tune.training.run.metrics import read_metrics

_WARM_UP_STEPS = 1  # The first compiles.


def calibrated(hardware: Hardware, config: Config, shape: MeshShape, target_share: float, seconds: float) -> Hardware:
    """Returns the hardware with the share of its arithmetic that a measured step reached.

    Args:
        hardware: That the step ran on.
        config: What ran.
        shape: Its mesh.
        target_share: Of all positions, those with a loss.
        seconds: Of one step.

    Raises:
        ConfigError: The hardware can't have done it in that time.
    """
    step = planned_step(abstract_train_state(config, shape, target_share), hardware._replace(share=1.0))
    share = step.computing / max(seconds - step.waiting, 1e-9)
    if not 0 < share <= 1:
        raise ConfigError(
            f"A step of {seconds:.3g} s can't have run on {hardware.name}: its arithmetic alone takes "
            f"{step.computing:.3g} s at full speed. Name the hardware that it ran on with --hardware."
        )
    return hardware._replace(share=share)


def calibrated_by_run(hardware: Hardware, workdir: Path, config: Config, shape: MeshShape) -> Hardware:
    """Returns the hardware as a run that was on it found it.

    Args:
        hardware: That the run was on.
        workdir: Of the run.
        config: Its settings.
        shape: Its mesh.

    Raises:
        ConfigError: It has no two steps yet.
    """
    rows = [row for row in read_metrics(workdir) if "step_seconds" in row][_WARM_UP_STEPS:]
    if not rows:
        raise ConfigError(f"{workdir} has no metrics of at least two steps to calibrate with. Train there first.")
    seconds = statistics.median(row["step_seconds"] for row in rows)
    num_positions = config.training.batch_size * config.row_length
    target_share = statistics.median(row["num_target_tokens"] for row in rows) / num_positions
    return calibrated(hardware, config, shape, target_share, seconds)
