"""Runs a model by one compiled program for each kind of decoder block, called block after block.

One program for a whole step repeats each block's code as often as there are blocks: a Gemma 3 270M's takes eight
seconds to load even when it was compiled before, and half a gigabyte. Here the host calls the program of a block's kind
with that block's arrays, so that there is only as much code as there are kinds. The mathematics is the same.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_tune.data import Batch
from gemma_tune.models.blocks import block_inputs, block_kinds, run_block, run_replacing_blocks
from gemma_tune.models.functional import Params, params_scope
from gemma_tune.models.remat import POLICIES
from gemma_tune.runtime.backend import keras
from gemma_tune.training.losses.cross_entropy import LossSums
from gemma_tune.training.step.compile_once import CompiledOnce, OncePerShape, compile_all
from gemma_tune.training.step.residuals import Residuals

BlockParams = list[jax.Array]
BlockArguments = dict[str, Any]  # Keyword arguments of every block, besides its input.
LossOfHidden = Callable[[Params, Params, jax.Array, Batch], LossSums]


class ForwardPrograms(NamedTuple):
    """Compiled programs of a forward pass, for one shape of batch.

    Attributes:
        embed: Program that returns the first block's input, and the arguments of all blocks.
        blocks: Programs by kind of block, which return the block's output and its residuals.
        x: Shape of a block's input and output, [B, L, D].
        block_arguments: Shapes of the arguments of all blocks.
        residuals: Shapes of the residuals, by kind of block.
    """

    embed: Callable
    blocks: dict[int, Callable]
    x: Any
    block_arguments: BlockArguments
    residuals: dict[int, Residuals]


class PerBlockProgram:
    """The programs of a model, compiled when first called. Training and evaluation share those of the forward pass.

    Args:
        model: A CausalLM whose backbone `blocks_are_sequential`, transformed for training.
        remat: `none`, `dots` or `full`: which residuals of a block are kept, and which are recomputed.

    Attributes:
        kinds: Kind of each block: the index of the first block that computes the same.
        paths: Variable paths of each block.
    """

    def __init__(self, model: keras.Model, remat: str):
        self._model, self._backbone = model, model.backbone
        self._policy = POLICIES[remat]
        self._blocks = self._backbone.transformer_layers
        self.kinds = block_kinds(self._backbone)
        self.paths = [[variable.path for variable in block.variables] for block in self._blocks]
        self._inside = {path for paths in self.paths for path in paths}
        self._embeddings = self._backbone.token_embedding._embeddings
        self._forward = OncePerShape("The forward pass", self._compile_forward, warns=False)

    def forward(self, trainable: Params, frozen: Params, batch: Batch) -> ForwardPrograms:
        """Returns the programs of the forward pass for batches of this shape."""
        return self._forward(trainable, frozen, batch)

    def make_loss(self, loss_of_hidden: LossOfHidden) -> Callable[[Params, Params, Batch], LossSums]:
        """Returns (trainable, frozen, batch) -> LossSums.

        Args:
            loss_of_hidden: (trainable, frozen, [B, L, D] final hidden states, batch) -> LossSums.
        """
        head = CompiledOnce(functools.partial(self.trace_head, loss_of_hidden), name="eval_step")

        def loss(trainable: Params, frozen: Params, batch: Batch) -> LossSums:
            forward = self.forward(trainable, frozen, batch)
            outer = self.outer_params(trainable), self.outer_params(frozen)
            x, arguments = forward.embed(*outer, batch)
            for index, kind in enumerate(self.kinds):
                x, _ = forward.blocks[kind](*self.block_params(index, trainable, frozen), x, arguments)
            return head(*outer, x, batch)

        return loss

    def outer_params(self, params: Params) -> dict[str, jax.Array]:
        """Returns the parameters that are in no block: the embedding and the final norm."""
        return {path: value for path, value in params.items() if path not in self._inside}

    def block_params(self, index: int, trainable: Params, frozen: Params) -> tuple[BlockParams, BlockParams]:
        """Returns the trainable and the frozen parameters of a block, in the order of its variables."""
        paths = self.paths[index]
        return [trainable[p] for p in paths if p in trainable], [frozen[p] for p in paths if p in frozen]

    def _compile_forward(self, trainable: Params, frozen: Params, batch: Batch) -> ForwardPrograms:
        embed = jax.jit(self.trace_embed).trace(self.outer_params(trainable), self.outer_params(frozen), batch)
        x, arguments = embed.out_info
        blocks = {
            kind: jax.jit(functools.partial(self._trace_block, kind)).trace(
                *self.block_params(kind, trainable, frozen), x, arguments
            )
            for kind in sorted(set(self.kinds))
        }
        residuals = {kind: traced.out_info[1] for kind, traced in blocks.items()}
        embed, blocks = compile_all((embed, blocks))
        return ForwardPrograms(embed, blocks, x, arguments, residuals)

    # Functions that are traced.

    def trace_embed(
        self, trainable: Params, frozen: Params, batch: Batch, rows: jax.Array | None = None
    ) -> tuple[jax.Array, BlockArguments]:
        """Returns the first block's input, and the arguments of all blocks.

        Args:
            trainable, frozen: Parameters in no block.
            batch: A batch.
            rows: [N, D] rows to be used in place of the embedding, for any N.
        """
        with params_scope(self._model, trainable, frozen) as scope:
            if rows is not None:
                # `params_scope` itself takes arrays of a variable's own shape only.
                scope.state_mapping[id(self._embeddings)] = rows
            return block_inputs(self._backbone, batch.token_ids, batch.segment_ids, batch.positions)

    def trace_embed_backward(
        self, trainable: Params, frozen: Params, batch: Batch, gradient: jax.Array, head_gradients: Params
    ) -> Params:
        """Returns the gradients in the parameters in no block: those from the head, and what reaches the embedding
        through the first block's input.

        Of a whole embedding only the rows of this batch's tokens are differentiated, so that no second gradient of its
        size is held beside the one from the head.
        """
        path, token_ids = self._embeddings.path, batch.token_ids.ravel()
        if path not in trainable:
            _, pullback = jax.vjp(lambda trainable: self.trace_embed(trainable, frozen, batch)[0], trainable)
            return jax.tree.map(jnp.add, head_gradients, pullback(gradient)[0])
        row_ids: Any = jnp.arange(token_ids.size).reshape(batch.token_ids.shape)
        by_row = batch._replace(token_ids=row_ids)
        rows = trainable[path][token_ids]
        _, pullback = jax.vjp(lambda rows: self.trace_embed(trainable, frozen, by_row, rows)[0], rows)
        return {**head_gradients, path: head_gradients[path].at[token_ids].add(pullback(gradient)[0])}

    def trace_head(
        self, loss_of_hidden: LossOfHidden, trainable: Params, frozen: Params, x: jax.Array, batch: Batch
    ) -> LossSums:
        """Returns the loss from the last block's output."""
        with params_scope(self._model, trainable, frozen):
            inputs = batch.token_ids, batch.segment_ids, batch.positions
            hidden = run_replacing_blocks(self._backbone, *inputs, lambda _, arguments: x)
            return loss_of_hidden(trainable, frozen, hidden, batch)

    def _trace_block(
        self, kind: int, trainable: BlockParams, frozen: BlockParams, x: jax.Array, arguments: BlockArguments
    ) -> tuple[jax.Array, Residuals]:
        """Returns a block's output and its residuals."""
        block = self._blocks[kind]

        def compute(trainable: BlockParams, x: jax.Array) -> jax.Array:
            some, others = iter(trainable), iter(frozen)
            values = [next(some if variable.trainable else others) for variable in block.variables]
            return run_block(block, values, x, arguments)

        if self._policy is not None:
            compute = jax.checkpoint(compute, policy=self._policy, prevent_cse=False)
        output, pullback = jax.vjp(compute, trainable, x)
        return output, Residuals.of(pullback, (trainable, frozen, x, arguments))


def per_block_program(program: str, model: keras.Model, remat: str) -> PerBlockProgram | None:
    """Returns the programs of a model's blocks, or None if one program computes the whole step.

    Args:
        program: `per_block` or `whole`, from `transform_for_training`.
        model: The transformed CausalLM.
        remat: `none`, `dots` or `full`.
    """
    return PerBlockProgram(model, remat) if program == "per_block" else None
