"""Hands what a backward pass needs from the program that runs forward to the one that runs backward."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What a pullback of `jax.vjp` needs besides the inputs of the function that was differentiated.

    How the pullback is put together again depends on the shapes that it was traced with. It is a static part of this
    tree, so that the programs for each shape have their own.

    Attributes:
        arrays: Arrays of the pullback that are none of the inputs.
        structure: Tree structure of the pullback.
        input_indices: Index of the input that each array of the pullback is; None for one of `arrays`.
    """

    arrays: list[jax.Array]
    structure: Any = dataclasses.field(metadata={"static": True})
    input_indices: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, pullback: Callable, inputs: Any) -> "Residuals":
        """Takes a pullback apart.

        Args:
            pullback: Second value of `jax.vjp`.
            inputs: Tree of arrays that will be at hand in the backward pass.
        """
        leaves, structure = jax.tree.flatten(pullback)
        indices = {id(leaf): index for index, leaf in enumerate(jax.tree.leaves(inputs))}
        input_indices = tuple(indices.get(id(leaf)) for leaf in leaves)
        arrays = [leaf for leaf, index in zip(leaves, input_indices, strict=True) if index is None]
        return cls(arrays, structure, input_indices)

    def pullback(self, inputs: Any) -> Callable:
        """Returns the pullback, put together again from the same inputs."""
        input_leaves, arrays = jax.tree.leaves(inputs), iter(self.arrays)
        leaves = [next(arrays) if index is None else input_leaves[index] for index in self.input_indices]
        return jax.tree.unflatten(self.structure, leaves)
