"""How a run is spread over devices: how many parts each of the three axes has."""

import math
from typing import NamedTuple

from gemma_tune.errors import ConfigError, did_you_mean

AUTO_MESH = "auto"


class MeshShape(NamedTuple):
    """Parts along each axis of a mesh of devices.

    data: Copies of the weights, each with its own rows of a batch. fsdp: Parts of the weights and of the optimizer's
        state, each with its own rows too; a layer's parts are gathered where they are needed (ZeRO, arXiv:1910.02054).
        model: Parts of each product: of the heads, of the feed-forward width, of the vocabulary (Megatron-LM,
        arXiv:1909.08053).
    """

    data: int = 1
    fsdp: int = 1
    model: int = 1

    @property
    def num_devices(self) -> int:
        """How many devices it takes."""
        return math.prod(self)

    @property
    def num_row_shards(self) -> int:
        """In how many parts the rows of a batch are cut."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return ",".join(f"{axis}:{size}" for axis, size in self._asdict().items() if size > 1) or "data:1"


def parse_mesh(text: str) -> MeshShape:
    """Reads `data:2,fsdp:2,model:2`. Axes that are not named have one part.

    Raises:
        ConfigError: It is written otherwise; says how.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, colon, size = part.strip().partition(":")
        if axis not in MeshShape._fields:
            hint = did_you_mean(axis, [*MeshShape._fields, AUTO_MESH])
            raise ConfigError(f"training.mesh={text}: there is no axis {axis!r}.{hint} {_HOW}")
        if not colon or not size.isdecimal() or not int(size) or axis in sizes:
            raise ConfigError(f"training.mesh={text}: {part.strip()!r} gives no size to {axis}. {_HOW}")
        sizes[axis] = int(size)
    return MeshShape(**sizes)


def fitting_mesh(num_devices: int, num_rows: int) -> MeshShape:
    """Returns what `auto` stands for: as many parts for fsdp as the rows allow, and the rest of the devices for model.

    Args:
        num_devices: All of them are used.
        num_rows: That go through the model at a time.
    """
    fsdp = math.gcd(num_devices, num_rows)
    return MeshShape(fsdp=fsdp, model=num_devices // fsdp)


_HOW = f"Write for example data:2,fsdp:2,model:2, with one or more of the axes, or {AUTO_MESH}."
