"""What a run would take on devices that aren't there, put together: memory, time, cost, and the biggest batch."""

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
    """A run on a mesh of one kind of chips.

    memory: On each. step: One of the run. biggest_batch: The most rows of a step that fit; 0: not even the fewest that
        the mesh can cut. biggest_step: A step of so many.
    """

    hardware: Hardware
    shape: MeshShape
    memory: PlannedMemory
    step: PlannedStep
    max_batch_size: int
    max_batch_step: PlannedStep | None

    @property
    def fits(self) -> bool:
        """Returns whether each device has room."""
        return self.memory.total <= usable_bytes(self.hardware)

    @property
    def tokens_per_second(self) -> float:
        """Returns the positions that all devices get through."""
        return self.step.num_tokens / self.step.seconds

    @property
    def dollars_per_hour(self) -> float:
        """Returns what all devices are rented for."""
        return self.hardware.dollars_per_hour * self.shape.num_devices

    def dollars(self, num_tokens: float) -> float:
        """Returns what so many positions cost."""
        return num_tokens / self.tokens_per_second / 3600 * self.dollars_per_hour


def mesh_shape(text: str, num_devices: int, num_rows: int) -> MeshShape:
    """Returns the mesh that `--mesh` and `--num_devices` say.

    Args:
        text: `data:2,fsdp:2,model:2`, `auto`, or empty for one device, or for `auto` with several.
        num_devices: 0: as many as `text` takes.
        num_rows: That go through the model at a time.

    Raises:
        ConfigError: The mesh takes another number of devices.
    """
    if text in ("", AUTO_MESH):
        return fitting_mesh(num_devices, num_rows) if num_devices > 1 else MeshShape()
    shape = parse_mesh(text)
    if num_devices not in (0, shape.num_devices):
        raise ConfigError(
            f"--mesh={text} takes {shape.num_devices} devices; --num_devices={num_devices} says otherwise."
        )
    return shape


def make_plans(config: Config, shape: MeshShape, target_share: float, chips: list[Hardware]) -> list[Plan]:
    """Returns a plan for each kind of chip.

    Args:
        config: The run.
        shape: The mesh.
        target_share: Of all positions, those with a loss.
        chips: To compare.

    Raises:
        ModelError: The model's sizes aren't known.
        ConfigError: The rows of a batch can't be cut as the mesh asks.
    """
    run = abstract_train_state(config.replace({"training.mesh": str(shape)}), shape, target_share)
    memory, least = planned_memory(run), config.training.grad_accum_steps * shape.num_row_shards
    plans = []
    for chip in chips:
        room = usable_bytes(chip)
        biggest = _biggest(least, lambda rows, room=room: _bytes_of(run, rows) <= room)  # type: ignore[misc]
        max_batch_step = planned_step(with_batch_size(run, biggest), chip) if biggest else None
        plans.append(Plan(chip, shape, memory, planned_step(run, chip), biggest, max_batch_step))
    return plans


def _bytes_of(run: AbstractTrainState, batch_size: int) -> float:
    return planned_memory(with_batch_size(run, batch_size)).total


def _biggest(unit: int, fits: Callable[[int], bool]) -> int:
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
    """Returns what to change when a run doesn't fit, with the flags that say so; what costs least first."""
    training = config.training
    found = []
    least = shape.num_row_shards
    if training.batch_size > least * training.grad_accum_steps:
        accumulated = config.replace({"training.grad_accum_steps": training.batch_size // least})
        found.append((f"--config.training.grad_accum_steps={training.batch_size // least}", accumulated, shape))
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
    """Returns the flags of the first of `memory_saving_changes` with which a run fits, or ""."""
    for flags, changed, wider in memory_saving_changes(config, shape):
        if planned_memory(abstract_train_state(changed, wider, target_share)).total <= usable_bytes(chip):
            return flags
    return ""
