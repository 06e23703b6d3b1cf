"""The shape of a mesh of devices: how many parts each of its three axes has, and how that is written."""

import math
from typing import NamedTuple

from gemma_tune.errors import ConfigError, did_you_mean

AUTO_MESH = "auto"
_HOW = f"Write for example data:2,fsdp:2,model:2, with one or more of the axes, or {AUTO_MESH}."


class MeshShape(NamedTuple):
    """The number of parts along each axis of a mesh of devices.

    Attributes:
        data: Copies of the weights, each with rows of a batch of its own.
        fsdp: Parts of the weights and of the optimizer's state, each with rows of a batch of its own; the parts of a
            layer are gathered when they are needed (ZeRO, arXiv:1910.02054).
        model: Parts of each matrix product: of the heads, of the feed-forward width, of the vocabulary (Megatron-LM,
            arXiv:1909.08053).
    """

    data: int = 1
    fsdp: int = 1
    model: int = 1

    @property
    def num_devices(self) -> int:
        """Number of devices of the mesh."""
        return math.prod(self)

    @property
    def num_row_shards(self) -> int:
        """Number of parts that the rows of a batch are cut into."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return ",".join(f"{axis}:{size}" for axis, size in self._asdict().items() if size > 1) or "data:1"


def parse_mesh(text: str) -> MeshShape:
    """Reads a mesh shape such as `data:2,fsdp:2,model:2`. Axes that are not named have one part.

    Raises:
        ConfigError: The text has another form; the message says how to write it.
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
    """Returns the mesh shape that `auto` stands for: fsdp over as many devices as the rows allow, model over the rest.

    Args:
        num_devices: Number of devices, all of which are used.
        num_rows: Rows of a micro-batch.
    """
    fsdp = math.gcd(num_devices, num_rows)
    return MeshShape(fsdp=fsdp, model=num_devices // fsdp)
