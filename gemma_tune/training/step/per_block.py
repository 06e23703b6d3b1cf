"""Loss and gradients by one compiled program for each kind of decoder block, called block after block.

One program for a whole step repeats each block's code as often as there are blocks: a Gemma 3 270M's takes eight
seconds to load even when it was compiled before, and half a gigabyte. Here the host calls the program of a block's kind
with that block's arrays, forward and then backward, so that there is only as much code as there are kinds. What a
block's backward pass needs is handed from one program to the other; `remat` says what that is. The mathematics is the
same.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_tune.data import Batch
from gemma_tune.models.blocks import block_kinds, call_block, run_before, run_with
from gemma_tune.models.functional import Params, bound
from gemma_tune.models.remat import POLICIES
from gemma_tune.runtime.backend import keras
from gemma_tune.training.losses.cross_entropy import LossSums
from gemma_tune.training.step.compile_once import (
    CompiledOnce,
    OncePerShape,
    StepMemory,
    compile_all,
    memory_of,
    num_bytes,
)

Arrays = list[jax.Array]
LossOfHidden = Callable[[Params, Params, jax.Array, Batch], LossSums]
LossesOfHidden = dict[int, LossOfHidden]  # Most positions with a loss -> for batches that have no more of them.


class _Forward(NamedTuple):
    """Compiled for one shape of batch: what runs before the blocks, and each kind of block, which also returns what its
    backward pass needs. x, named, kept: the shapes of what these return.
    """

    begin: Callable
    blocks: dict[int, Callable]
    x: Any
    named: dict[str, Any]
    kept: dict[int, Any]


class _Backward(NamedTuple):
    """Compiled for one shape of batch. begin is None where nothing before the blocks is trained.

    finish: By the most positions with a loss; smaller ones are added when a batch first asks for them. of_finish: The
        shapes of what they take.
    """

    finish: dict[int, Callable]
    of_finish: tuple
    blocks: dict[int, Callable]
    begin: Callable | None
    temporary_bytes: int


class PerBlockProgram:
    """The programs of a model, compiled when first called. Training and evaluation share those of the forward pass.

    Args:
        model: A CausalLM whose backbone `can_be_split`, prepared for training.
        remat: `none`, `dots` or `full`.
    """

    def __init__(self, model: keras.Model, remat: str):
        self._model, self._backbone = model, model.backbone
        self._policy = POLICIES[remat]
        self._blocks = self._backbone.transformer_layers
        self._kinds = block_kinds(self._backbone)
        self._paths = [[variable.path for variable in block.variables] for block in self._blocks]
        self._table = self._backbone.token_embedding._embeddings
        self._inside = {path for paths in self._paths for path in paths}
        self._pullbacks: dict[int, Any] = {}  # kind -> how to put a pullback together again; known once traced.
        self._forward = OncePerShape("The forward pass", self._compile_forward, warns=False)

    def make_loss(self, loss_of_hidden: LossOfHidden) -> Callable[[Params, Params, Batch], LossSums]:
        """Returns (trainable, frozen, batch) -> LossSums.

        Args:
            loss_of_hidden: (trainable, frozen, [B, L, D] final hidden states, batch) -> LossSums.
        """
        finish = CompiledOnce(functools.partial(self._finish_fn, loss_of_hidden), name="eval_step")

        def loss(trainable: Params, frozen: Params, batch: Batch) -> LossSums:
            forward = self._forward(trainable, frozen, batch)
            outer = self._outer(trainable), self._outer(frozen)
            x, named = forward.begin(*outer, batch)
            for index, kind in enumerate(self._kinds):
                x, _ = forward.blocks[kind](*self._of_block(index, trainable, frozen), x, named)
            return finish(*outer, x, batch)

        return loss

    def make_gradients(self, losses_of_hidden: LossesOfHidden) -> "BlockwiseGradients":
        """Returns (trainable, frozen, scale, batch) -> (gradients of scale · loss_sum by path, LossSums)."""
        return BlockwiseGradients(self, losses_of_hidden)

    def _outer(self, params: Params) -> dict[str, jax.Array]:
        return {path: value for path, value in params.items() if path not in self._inside}

    def _of_block(self, index: int, trainable: Params, frozen: Params) -> tuple[Arrays, Arrays]:
        paths = self._paths[index]
        return [trainable[p] for p in paths if p in trainable], [frozen[p] for p in paths if p in frozen]

    def _compile_forward(self, trainable: Params, frozen: Params, batch: Batch) -> _Forward:
        begin = jax.jit(self._begin_fn).trace(self._outer(trainable), self._outer(frozen), batch)
        x, named = begin.out_info
        blocks = {
            kind: jax.jit(functools.partial(self._forward_fn, kind)).trace(
                *self._of_block(kind, trainable, frozen), x, named
            )
            for kind in sorted(set(self._kinds))
        }
        kept = {kind: traced.out_info[1] for kind, traced in blocks.items()}
        begin, blocks = compile_all((begin, blocks))
        return _Forward(begin, blocks, x, named, kept)

    # What is traced.

    def _begin_fn(
        self, trainable: Params, frozen: Params, batch: Batch, table: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the first block's input, and the arguments of all blocks. table: Another embedding, of any length."""
        with bound(self._model, trainable, frozen) as scope:
            if table is not None:
                scope.state_mapping[id(self._table)] = table  # Scopes take no other shapes when they are made.
            return run_before(self._backbone, batch.token_ids, batch.segment_ids, batch.positions)

    def _begin_backward_fn(
        self, trainable: Params, frozen: Params, batch: Batch, gradient: jax.Array, others: Params
    ) -> Params:
        """Adds what reaches the embedding through the first block's input.

        Of a whole table only the rows of this batch's tokens are differentiated, so that no second gradient of its size
        is held beside the one that the head gave.
        """
        path, token_ids = self._table.path, batch.token_ids.ravel()
        if path not in trainable:
            _, pullback = jax.vjp(lambda trainable: self._begin_fn(trainable, frozen, batch)[0], trainable)
            return jax.tree.map(jnp.add, others, pullback(gradient)[0])
        places: Any = jnp.arange(token_ids.size).reshape(batch.token_ids.shape)
        by_place = batch._replace(token_ids=places)
        rows = trainable[path][token_ids]
        _, pullback = jax.vjp(lambda rows: self._begin_fn(trainable, frozen, by_place, rows)[0], rows)
        return {**others, path: others[path].at[token_ids].add(pullback(gradient)[0])}

    def _finish_fn(
        self, loss_of_hidden: LossOfHidden, trainable: Params, frozen: Params, x: jax.Array, batch: Batch
    ) -> LossSums:
        """Returns the loss from what the last block returned."""
        with bound(self._model, trainable, frozen):
            hidden = run_with(self._backbone, batch.token_ids, batch.segment_ids, batch.positions, lambda _, named: x)
            return loss_of_hidden(trainable, frozen, hidden, batch)

    def _call(self, kind: int, trainable: Arrays, frozen: Arrays, x: jax.Array, named: dict[str, Any]) -> jax.Array:
        block = self._blocks[kind]
        some, others = iter(trainable), iter(frozen)
        values = [next(some if variable.trainable else others) for variable in block.variables]
        return call_block(block, values, x, named)

    def _forward_fn(
        self, kind: int, trainable: Arrays, frozen: Arrays, x: jax.Array, named: dict[str, Any]
    ) -> tuple[jax.Array, Arrays]:
        """Returns the block's output, and what its pullback needs beyond the block's own inputs."""

        def compute(trainable: Arrays, x: jax.Array) -> jax.Array:
            return self._call(kind, trainable, frozen, x, named)

        if self._policy is not None:
            compute = jax.checkpoint(compute, policy=self._policy, prevent_cse=False)
        output, pullback = jax.vjp(compute, trainable, x)
        leaves, tree = jax.tree.flatten(pullback)
        inputs = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves((trainable, frozen, x, named)))}
        places = [inputs.get(id(leaf)) for leaf in leaves]
        self._pullbacks[kind] = tree, places
        return output, [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]

    def _backward_fn(
        self,
        kind: int,
        trainable: Arrays,
        frozen: Arrays,
        x: jax.Array,
        named: dict[str, Any],
        kept: Arrays,
        gradient: jax.Array,
    ) -> tuple[Arrays, jax.Array]:
        """Returns the gradients in what is trained and in the block's input."""
        tree, places = self._pullbacks[kind]
        inputs, rest = jax.tree.leaves((trainable, frozen, x, named)), iter(kept)
        leaves = [next(rest) if place is None else inputs[place] for place in places]
        return jax.tree.unflatten(tree, leaves)(gradient)


class BlockwiseGradients:
    """Gradients by the programs of a `PerBlockProgram`: (trainable, frozen, scale, batch) -> (by path, LossSums).

    scale: [] float32, what the loss is multiplied with, or None. Of the losses the smallest that holds a batch's
    positions is taken: the head is most of a small Gemma's arithmetic, and reads padded positions too.
    """

    def __init__(self, per_block: PerBlockProgram, losses_of_hidden: LossesOfHidden):
        self._of, self._losses_of_hidden = per_block, dict(sorted(losses_of_hidden.items()))
        self._backward = OncePerShape("train_step", self._compile, keeps_memory=True)

    def __call__(
        self, trainable: Params, frozen: Params, scale: jax.Array | None, batch: Batch
    ) -> tuple[dict[str, jax.Array], LossSums]:
        """Runs forward and backward."""
        of = self._of
        forward, backward = of._forward(trainable, frozen, batch), self._backward(trainable, frozen, scale, batch)
        outer = of._outer(trainable), of._outer(frozen)
        x, named = forward.begin(*outer, batch)
        saved = []
        for index, kind in enumerate(of._kinds):
            before, (x, kept) = x, forward.blocks[kind](*of._of_block(index, trainable, frozen), x, named)
            saved.append((before, kept))
        (_, sums), (gradients, gradient) = self._finish(backward, batch)(*outer, x, scale, batch)
        del x
        for index, kind in reversed(list(enumerate(of._kinds))):
            before, kept = saved.pop()
            arrays = of._of_block(index, trainable, frozen)
            of_block, gradient = backward.blocks[kind](*arrays, before, named, kept, gradient)
            names = [path for path in of._paths[index] if path in trainable]
            gradients.update(zip(names, of_block, strict=True))
        if backward.begin:
            of_outer = {path: gradients.pop(path) for path in outer[0]}
            gradients.update(backward.begin(*outer, batch, gradient, of_outer))
        return gradients, sums

    def memory(self, trainable: Params, frozen: Params, scale: Any, batch: Batch) -> StepMemory:
        """Returns what a call takes, the gradients included, without running it. Takes shapes too."""
        argument = num_bytes((trainable, frozen, batch))
        temporary = self._backward(trainable, frozen, scale, batch).temporary_bytes
        return StepMemory(argument, temporary, argument + temporary)

    @property
    def num_programs(self) -> int:
        """For how many shapes programs were compiled."""
        return len(self._backward)

    def _compile(self, trainable: Params, frozen: Params, scale: Any, batch: Batch) -> _Backward:
        of = self._of
        forward = of._forward(trainable, frozen, batch)
        outer = of._outer(trainable), of._outer(frozen)

        of_finish = (*outer, forward.x, scale, batch)
        finish = self._trace_finish(self._most_targets, of_finish)
        of_outer, gradient = finish.out_info[1]
        blocks = {}
        for kind, kept in forward.kept.items():
            backward_fn = jax.jit(functools.partial(of._backward_fn, kind))
            arrays = of._of_block(kind, trainable, frozen)
            blocks[kind] = backward_fn.trace(*arrays, forward.x, forward.named, kept, gradient)
        begin_fn = jax.jit(of._begin_backward_fn, donate_argnums=4)  # It adds to the gradients that the head gave.
        begin = begin_fn.trace(*outer, batch, gradient, of_outer) if outer[0] else None
        finish, blocks, begin = compile_all((finish, blocks, begin))
        memories = [memory_of(program) for program in jax.tree.leaves((forward.blocks, finish, blocks, begin))]
        held = sum(num_bytes((forward.x, forward.kept[kind])) for kind in of._kinds) + num_bytes(trainable)
        most = max(memory.total_bytes - memory.argument_bytes for memory in memories)
        of_finish = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), of_finish)
        return _Backward({self._most_targets: finish}, of_finish, blocks, begin, held + most)

    def _finish(self, backward: _Backward, batch: Batch) -> Callable:
        """Returns the end of the forward pass for a batch: of the programs that are wide enough, the narrowest."""
        count = np.count_nonzero(batch.loss_weights)
        size = next((size for size in self._losses_of_hidden if size >= count), None)
        assert size is not None, f"a batch has {count} positions with a loss, and was to have {self._most_targets}"
        if size not in backward.finish:
            backward.finish[size] = self._trace_finish(size, backward.of_finish).lower().compile()
        return backward.finish[size]

    @property
    def _most_targets(self) -> int:
        return max(self._losses_of_hidden)

    def _trace_finish(self, size: int, inputs: tuple) -> Any:
        def loss_and_sums(
            trainable: Params, frozen: Params, x: jax.Array, scale: jax.Array | None, batch: Batch
        ) -> tuple[Any, LossSums]:
            sums = self._of._finish_fn(self._losses_of_hidden[size], trainable, frozen, x, batch)
            return sums.loss_sum if scale is None else sums.loss_sum * scale, sums

        return jax.jit(jax.value_and_grad(loss_and_sums, argnums=(0, 2), has_aux=True)).trace(*inputs)
