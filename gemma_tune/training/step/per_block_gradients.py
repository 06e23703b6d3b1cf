"""Loss and gradients by the programs of a `PerBlockProgram`: forward block after block, and backward the same way."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gemma_tune.data import Batch
from gemma_tune.models.functional import Params
from gemma_tune.training.losses.cross_entropy import LossSums
from gemma_tune.training.step.compile_once import OncePerShape, StepMemory, compile_all, memory_of, tree_num_bytes
from gemma_tune.training.step.per_block import BlockArguments, BlockParams, LossOfHidden, PerBlockProgram
from gemma_tune.training.step.residuals import Residuals


class _BackwardPrograms(NamedTuple):
    """Compiled programs of the head and of a backward pass, for one shape of batch.

    Attributes:
        heads: Programs of the final norm and the loss, by the most positions with a loss that they take. Smaller ones
            are added when a batch first fits into them.
        head_inputs: Shapes of the inputs of `heads`.
        blocks: Programs by kind of block.
        embed: Program of what is before the blocks; None if nothing is trained there.
        temporary_bytes: Bytes that are held while computing.
    """

    heads: dict[int, Callable]
    head_inputs: tuple
    blocks: dict[int, Callable]
    embed: Callable | None
    temporary_bytes: int


class PerBlockGradients:
    """Computes gradients: (trainable, frozen, scale, batch) -> (gradients of scale · loss_sum by path, LossSums).

    The scale is a [] float32, or None. Of the losses, the smallest that holds a batch's positions is taken: the head is
    most of a small Gemma's arithmetic, and computes padded positions too.

    Args:
        per_block: Programs of the model.
        losses_of_hidden: Loss functions by the most positions with a loss that they take.
    """

    def __init__(self, per_block: PerBlockProgram, losses_of_hidden: Mapping[int, LossOfHidden]):
        self._per_block, self._losses_of_hidden = per_block, dict(sorted(losses_of_hidden.items()))
        self._backward = OncePerShape("train_step", self._compile, keeps_memory=True)

    def __call__(
        self, trainable: Params, frozen: Params, scale: jax.Array | None, batch: Batch
    ) -> tuple[dict[str, jax.Array], LossSums]:
        """Runs forward and backward."""
        model = self._per_block
        forward, backward = model.forward(trainable, frozen, batch), self._backward(trainable, frozen, scale, batch)
        outer = model.outer_params(trainable), model.outer_params(frozen)
        x, arguments = forward.embed(*outer, batch)
        saved = []
        for index, kind in enumerate(model.kinds):
            block_input = x
            x, residuals = forward.blocks[kind](*model.block_params(index, trainable, frozen), x, arguments)
            saved.append((block_input, residuals))
        (_, sums), (gradients, gradient) = self._head(backward, batch)(*outer, x, scale, batch)
        del x
        for index, kind in reversed(list(enumerate(model.kinds))):
            block_input, residuals = saved.pop()
            params = model.block_params(index, trainable, frozen)
            of_block, gradient = backward.blocks[kind](*params, block_input, arguments, residuals, gradient)
            gradients.update(zip([path for path in model.paths[index] if path in trainable], of_block, strict=True))
        if backward.embed:
            head_gradients = {path: gradients.pop(path) for path in outer[0]}
            gradients.update(backward.embed(*outer, batch, gradient, head_gradients))
        return gradients, sums

    def memory(self, trainable: Params, frozen: Params, scale: Any, batch: Batch) -> StepMemory:
        """Returns what a call takes, the gradients included, without running it. Takes shapes too."""
        argument = tree_num_bytes((trainable, frozen, batch))
        temporary = self._backward(trainable, frozen, scale, batch).temporary_bytes
        return StepMemory(argument, temporary, argument + temporary)

    @property
    def num_programs(self) -> int:
        """Number of batch shapes that programs were compiled for."""
        return len(self._backward)

    def _compile(self, trainable: Params, frozen: Params, scale: Any, batch: Batch) -> _BackwardPrograms:
        model = self._per_block
        forward = model.forward(trainable, frozen, batch)
        outer = model.outer_params(trainable), model.outer_params(frozen)
        head_inputs = (*outer, forward.x, scale, batch)
        head = self._trace_head(self._most_targets, head_inputs)
        head_gradients, gradient = head.out_info[1]
        blocks = {}
        for kind, residuals in forward.residuals.items():
            inputs = (*model.block_params(kind, trainable, frozen), forward.x, forward.block_arguments)
            blocks[kind] = jax.jit(_block_backward).trace(*inputs, residuals, gradient)
        # It adds to the gradients from the head, in place.
        embed_backward = jax.jit(model.trace_embed_backward, donate_argnums=4)
        embed = embed_backward.trace(*outer, batch, gradient, head_gradients) if outer[0] else None
        head, blocks, embed = compile_all((head, blocks, embed))
        memories = [memory_of(program) for program in jax.tree.leaves((forward.blocks, head, blocks, embed))]
        held = sum(tree_num_bytes((forward.x, forward.residuals[kind])) for kind in model.kinds)
        most = max(memory.total_bytes - memory.argument_bytes for memory in memories)
        head_inputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), head_inputs)
        temporary_bytes = held + tree_num_bytes(trainable) + most
        return _BackwardPrograms({self._most_targets: head}, head_inputs, blocks, embed, temporary_bytes)

    def _head(self, backward: _BackwardPrograms, batch: Batch) -> Callable:
        """Returns the smallest program of the head that holds the batch's positions with a loss."""
        count = np.count_nonzero(batch.loss_weights)
        size = next((size for size in self._losses_of_hidden if size >= count), None)
        assert size is not None, f"a batch has {count} positions with a loss, and at most {self._most_targets} fit"
        if size not in backward.heads:
            backward.heads[size] = self._trace_head(size, backward.head_inputs).lower().compile()
        return backward.heads[size]

    @property
    def _most_targets(self) -> int:
        return max(self._losses_of_hidden)

    def _trace_head(self, size: int, inputs: tuple) -> Any:
        def loss_and_sums(
            trainable: Params, frozen: Params, x: jax.Array, scale: jax.Array | None, batch: Batch
        ) -> tuple[Any, LossSums]:
            sums = self._per_block.trace_head(self._losses_of_hidden[size], trainable, frozen, x, batch)
            return sums.loss_sum if scale is None else sums.loss_sum * scale, sums

        return jax.jit(jax.value_and_grad(loss_and_sums, argnums=(0, 2), has_aux=True)).trace(*inputs)


def _block_backward(
    trainable: BlockParams,
    frozen: BlockParams,
    x: jax.Array,
    arguments: BlockArguments,
    residuals: Residuals,
    gradient: jax.Array,
) -> tuple[BlockParams, jax.Array]:
    """Returns the gradients in a block's trainable parameters and in its input."""
    return residuals.pullback((trainable, frozen, x, arguments))(gradient)
