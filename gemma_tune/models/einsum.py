"""Parses the einsum equations of linear layers, such as `btd,ndh->btnh`."""

import functools
import re
from typing import NamedTuple

_EQUATION = re.compile(r"((?:\.\.\.)?[a-zA-Z]+),([a-zA-Z]+)->((?:\.\.\.)?[a-zA-Z]+)")


class EinsumAxes(NamedTuple):
    """The axis letters of a linear layer's equation.

    The kernel axes are of two kinds: those that the product sums over, which the inputs have too, and those that it
    keeps, which are axes of the outputs.

    Attributes:
        inputs: Letters of the inputs, such as `btd`.
        kernel: Letters of the kernel, such as `ndh`.
        outputs: Letters of the outputs, such as `btnh`.
    """

    inputs: str
    kernel: str
    outputs: str

    @property
    def summed(self) -> str:
        """Kernel letters that the product sums over, in the kernel's order: `d`."""
        return "".join(letter for letter in self.kernel if letter in self.inputs)

    @property
    def kept(self) -> str:
        """Kernel letters that the outputs keep, in the kernel's order: `nh`."""
        return "".join(letter for letter in self.kernel if letter not in self.inputs)

    @property
    def batch(self) -> str:
        """Input letters that the kernel doesn't have, and an ellipsis if there is one: `bt`."""
        return "".join(letter for letter in self.inputs if letter not in self.kernel)

    @property
    def summed_indices(self) -> tuple[int, ...]:
        """Indices of the kernel axes that the product sums over: (1,)."""
        return tuple(index for index, letter in enumerate(self.kernel) if letter in self.inputs)

    @property
    def kept_indices(self) -> tuple[int, ...]:
        """Indices of the kernel axes that the outputs keep: (0, 2)."""
        return tuple(index for index, letter in enumerate(self.kernel) if letter not in self.inputs)


@functools.cache
def parse_einsum(equation: str) -> EinsumAxes:
    """Returns the axis letters of an equation with two operands, inputs and kernel.

    Raises:
        ValueError: The equation has another form, such as one operand or no output.
    """
    match = _EQUATION.fullmatch(equation.replace(" ", ""))
    if not match:
        raise ValueError(f"{equation!r} is not an einsum equation of inputs and a kernel, such as 'btd,ndh->btnh'.")
    return EinsumAxes(*match.groups())
