"""Predicts memory, speed, cost and the largest batch of a run on devices that need not be present."""

from collections.abc import Callable
from typing import NamedTuple

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError
from gemma_tune.mesh import AUTO_MESH, MeshShape, fitting_mesh, parse_mesh
from gemma_tune.planning.abstract_train_state import AbstractTrainState, abstract_train_state, with_batch_size
from gemma_tune.planning.duration import PlannedStep, planned_step
from gemma_tune.planning.hardware import Hardware, usable_bytes
from gemma_tune.planning.step_memory import PlannedMemory, planned_memory

_LARGEST_BATCH = 1 << 16


class Plan(NamedTuple):
    """The predictions for a run on a mesh of one kind of chip.

    Attributes:
        hardware: Kind of chip.
        shape: Shape of the mesh.
        memory: Memory of a training step on each chip.
        step: Duration of a training step.
        max_batch_size: Largest batch size that fits; 0 where not even the smallest one that the mesh allows does.
        max_batch_step: Duration of a training step of that batch size; None where none fits.
    """

    hardware: Hardware
    shape: MeshShape
    memory: PlannedMemory
    step: PlannedStep
    max_batch_size: int
    max_batch_step: PlannedStep | None

    @property
    def fits(self) -> bool:
        """Returns whether a step fits into the memory of each chip."""
        return self.memory.total <= usable_bytes(self.hardware)

    @property
    def tokens_per_second(self) -> float:
        """Returns the positions per second of all chips together."""
        return self.step.num_tokens / self.step.seconds

    @property
    def dollars_per_hour(self) -> float:
        """Returns the rental price of all chips together."""
        return self.hardware.dollars_per_hour * self.shape.num_devices

    def dollars(self, num_tokens: float) -> float:
        """Returns the cost of training on so many positions."""
        return num_tokens / self.tokens_per_second / 3600 * self.dollars_per_hour


def mesh_shape(text: str, num_devices: int, num_rows: int) -> MeshShape:
    """Returns the mesh that `--mesh` and `--num_devices` say.

    Args:
        text: `data:2,fsdp:2,model:2`, `auto`, or empty for one device, or for `auto` with several.
        num_devices: Number of devices; 0 for as many as `text` needs.
        num_rows: Number of rows in a micro-batch.

    Raises:
        ConfigError: The mesh needs another number of devices.
    """
    if text in ("", AUTO_MESH):
        return fitting_mesh(num_devices, num_rows) if num_devices > 1 else MeshShape()
    shape = parse_mesh(text)
    if num_devices not in (0, shape.num_devices):
        raise ConfigError(
            f"--mesh={text} needs {shape.num_devices} devices, but --num_devices={num_devices}. Change one of them, or "
            "leave --num_devices out."
        )
    return shape


def make_plans(config: Config, shape: MeshShape, target_share: float, chips: list[Hardware]) -> list[Plan]:
    """Returns a plan for each kind of chip.

    Args:
        config: Settings of the run.
        shape: Shape of the mesh.
        target_share: Share of all positions that have a loss.
        chips: Kinds of chip to compare.

    Raises:
        ModelError: The model's sizes are unknown.
        ConfigError: The mesh doesn't divide the rows of a batch evenly.
    """
    run = abstract_train_state(config.replace({"training.mesh": str(shape)}), shape, target_share)
    memory, smallest = planned_memory(run), config.training.grad_accum_steps * shape.num_row_shards
    plans = []
    for chip in chips:
        room = usable_bytes(chip)
        largest = _largest_multiple(smallest, lambda rows, room=room: _total_bytes(run, rows) <= room)  # type: ignore[misc]
        largest_step = planned_step(with_batch_size(run, largest), chip) if largest else None
        plans.append(Plan(chip, shape, memory, planned_step(run, chip), largest, largest_step))
    return plans


def _total_bytes(run: AbstractTrainState, batch_size: int) -> float:
    return planned_memory(with_batch_size(run, batch_size)).total


def _largest_multiple(unit: int, fits: Callable[[int], bool]) -> int:
    """Returns the largest multiple of `unit` that fits, or 0."""
    if not fits(unit):
        return 0
    count = 1
    while fits(2 * count * unit) and 2 * count * unit <= _LARGEST_BATCH:
        count *= 2
    step = count // 2
    while step:
        if fits((count + step) * unit):
            count += step
        step //= 2
    return count * unit


def memory_saving_changes(config: Config, shape: MeshShape) -> list[tuple[str, Config, MeshShape]]:
    """Returns changes that make a run need less memory, each as (flags, config, mesh shape), the cheapest first."""
    training = config.training
    found = []
    most_steps = training.batch_size // shape.num_row_shards
    if training.batch_size > shape.num_row_shards * training.grad_accum_steps:
        accumulated = config.replace({"training.grad_accum_steps": most_steps})
        found.append((f"--config.training.grad_accum_steps={most_steps}", accumulated, shape))
    if training.remat != "full":
        found.append(("--config.training.remat=full", config.replace({"training.remat": "full"}), shape))
    if training.method == "lora":
        found.append(("--method=qlora", config.replace({"training.method": "qlora"}), shape))
    if training.method == "full":
        found.append(("--method=lora", config.replace({"training.method": "lora"}), shape))
    for factor in (2, 4, 8, 16, 32, 64):
        wider = shape._replace(fsdp=shape.fsdp * factor)
        rows = max(training.batch_size, wider.num_row_shards * training.grad_accum_steps)
        rows = -(-rows // wider.num_row_shards) * wider.num_row_shards
        flags = f"--mesh={wider}" + (f" --batch_size={rows}" if rows != training.batch_size else "")
        found.append((flags, config.replace({"training.batch_size": rows}), wider))
    return found


def first_fitting_change(config: Config, shape: MeshShape, target_share: float, chip: Hardware) -> str:
    """Returns the flags of the first of `memory_saving_changes` with which a run fits on a chip, or ""."""
    for flags, changed, wider in memory_saving_changes(config, shape):
        if planned_memory(abstract_train_state(changed, wider, target_share)).total <= usable_bytes(chip):
            return flags
    return ""
