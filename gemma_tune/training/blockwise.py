"""Loss and gradients by one compiled program for each kind of decoder block, called block after block.

One program for a whole step repeats each block's code as often as there are blocks: a Gemma 3 270M's takes eight
seconds to load even when it was compiled before, and half a gigabyte. Here the host calls the program of a block's kind
with that block's arrays, forward and then backward, so that there is only as much code as there are kinds. What a
block's backward pass needs is handed from one program to the other; `remat` says what that is. The mathematics is the
same.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_tune.data import Batch
from gemma_tune.keras_runtime import keras
from gemma_tune.models.blocks import block_kinds, call_block, run_with
from gemma_tune.models.functional import Params, bound
from gemma_tune.models.remat import POLICIES
from gemma_tune.training.compile_once import OncePerShape, StepMemory, memory_of
from gemma_tune.training.losses import LossSums

Arrays = list[jax.Array]
LossOfHidden = Callable[[Params, Params, jax.Array, Batch], LossSums]


class _Programs(NamedTuple):
    """Compiled for one shape of batch. forward and backward: by kind. What only gradients need is None for a loss."""

    begin: Callable
    forward: dict[int, Callable]
    finish: Callable
    backward: dict[int, Callable]
    begin_backward: Callable | None
    memory: StepMemory  # Of one call, without arguments.


class Blockwise:
    """The programs of a model, compiled when first called.

    Args:
        model: A CausalLM whose backbone `can_be_split`, prepared for training.
        loss_of_hidden: (trainable, frozen, [B, L, D] final hidden states, batch) -> LossSums.
        remat: `none`, `blocks` or `full`.
    """

    def __init__(self, model: keras.Model, loss_of_hidden: LossOfHidden, remat: str):
        self._model, self._backbone = model, model.backbone
        self._loss_of_hidden, self._policy = loss_of_hidden, POLICIES[remat]
        self._blocks = self._backbone.transformer_layers
        self._kinds = block_kinds(self._backbone)
        self._paths = [[variable.path for variable in block.variables] for block in self._blocks]
        self._inside = {path for paths in self._paths for path in paths}
        self._pullbacks: dict[int, Any] = {}  # kind -> how to put a pullback together again; known once traced.
        self._for_loss = OncePerShape("eval_step", self._compile_loss)
        self._for_gradients = OncePerShape("train_step", self._compile_gradients)
        self._latest: tuple[Any, Any] = (None, None)  # Shapes of a batch, and its programs.

    @property
    def num_programs(self) -> int:
        """For how many shapes programs were compiled."""
        return len(self._for_loss) + len(self._for_gradients)

    def loss(self, trainable: Params, frozen: Params, batch: Batch) -> LossSums:
        """Returns the loss alone."""
        programs = self._programs(self._for_loss, trainable, frozen, batch)
        outer = self._outer(trainable), self._outer(frozen)
        x, named = programs.begin(*outer, batch)
        for index, kind in enumerate(self._kinds):
            x = programs.forward[kind](*self._of_block(index, trainable, frozen), x, named)
        return programs.finish(*outer, x, batch)

    def gradients(self, trainable: Params, frozen: Params, batch: Batch) -> tuple[dict[str, jax.Array], LossSums]:
        """Returns the gradients of loss_sum by path, and the sums."""
        programs = self._programs(self._for_gradients, trainable, frozen, batch)
        outer = self._outer(trainable), self._outer(frozen)
        x, named = programs.begin(*outer, batch)
        saved = []
        for index, kind in enumerate(self._kinds):
            before, (x, kept) = x, programs.forward[kind](*self._of_block(index, trainable, frozen), x, named)
            saved.append((before, kept))
        (_, sums), (gradients, gradient) = programs.finish(*outer, x, batch)
        del x
        for index, kind in reversed(list(enumerate(self._kinds))):
            before, kept = saved.pop()
            arrays = self._of_block(index, trainable, frozen)
            of_block, gradient = programs.backward[kind](*arrays, before, named, kept, gradient)
            names = [path for path in self._paths[index] if path in trainable]
            gradients.update(zip(names, of_block, strict=True))
        if programs.begin_backward:
            of_outer = {path: gradients.pop(path) for path in outer[0]}
            gradients.update(programs.begin_backward(*outer, batch, gradient, of_outer))
        return gradients, sums

    def memory(self, trainable: Params, frozen: Params, batch: Batch) -> StepMemory:
        """Returns what `gradients` takes, its gradients included, without running it. Takes shapes too."""
        memory = self._programs(self._for_gradients, trainable, frozen, batch).memory
        argument = _num_bytes((trainable, frozen, batch))
        return StepMemory(argument, memory.temporary_bytes, argument + memory.temporary_bytes)

    def _programs(self, programs: OncePerShape, trainable: Params, frozen: Params, batch: Batch) -> _Programs:
        shapes = programs, [field.shape for field in batch]
        if self._latest[0] != shapes:
            self._latest = shapes, programs(trainable, frozen, batch)
        return self._latest[1]

    def _outer(self, params: Params) -> dict[str, jax.Array]:
        return {path: value for path, value in params.items() if path not in self._inside}

    def _of_block(self, index: int, trainable: Params, frozen: Params) -> tuple[Arrays, Arrays]:
        paths = self._paths[index]
        return [trainable[p] for p in paths if p in trainable], [frozen[p] for p in paths if p in frozen]

    def _compile_loss(self, trainable: Params, frozen: Params, batch: Batch) -> _Programs:
        outer = self._outer(trainable), self._outer(frozen)
        begin = jax.jit(self._begin_fn).trace(*outer, batch)
        x, named = begin.out_info
        forward = {
            kind: jax.jit(functools.partial(self._call, kind)).trace(*self._of_block(kind, trainable, frozen), x, named)
            for kind in sorted(set(self._kinds))
        }
        return _compile(begin, forward, jax.jit(self._finish_fn).trace(*outer, x, batch), {}, None, 0)

    def _compile_gradients(self, trainable: Params, frozen: Params, batch: Batch) -> _Programs:
        outer = self._outer(trainable), self._outer(frozen)
        begin = jax.jit(self._begin_fn).trace(*outer, batch)
        x, named = begin.out_info
        finish_fn = jax.value_and_grad(self._loss_and_sums, argnums=(0, 2), has_aux=True)
        finish = jax.jit(finish_fn).trace(*outer, x, batch)
        of_outer, gradient = finish.out_info[1]
        forward, backward, kept_bytes = {}, {}, {}
        for kind in sorted(set(self._kinds)):
            arrays = self._of_block(kind, trainable, frozen)
            forward[kind] = jax.jit(functools.partial(self._forward_fn, kind)).trace(*arrays, x, named)
            kept = forward[kind].out_info[1]
            kept_bytes[kind] = _num_bytes((x, kept))
            backward_fn = functools.partial(self._backward_fn, kind)
            backward[kind] = jax.jit(backward_fn).trace(*arrays, x, named, kept, gradient)
        begin_backward = jax.jit(self._begin_backward_fn).trace(*outer, batch, gradient, of_outer) if outer[0] else None
        held = sum(kept_bytes[kind] for kind in self._kinds) + _num_bytes(trainable)
        return _compile(begin, forward, finish, backward, begin_backward, held)

    # What is traced.

    def _begin_fn(self, trainable: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the first block's input, and the arguments of all blocks."""
        found: list[Any] = []

        def run(x: jax.Array, named: dict[str, Any]) -> jax.Array:
            found.append((x, named))
            return x

        with bound(self._model, trainable, frozen):
            run_with(self._backbone, batch.token_ids, batch.segment_ids, batch.positions, run)
        return found[0]

    def _begin_backward_fn(
        self, trainable: Params, frozen: Params, batch: Batch, gradient: jax.Array, others: Params
    ) -> Params:
        """Adds what reaches the embedding through the first block's input."""
        _, pullback = jax.vjp(lambda trainable: self._begin_fn(trainable, frozen, batch)[0], trainable)
        return jax.tree.map(jnp.add, others, pullback(gradient)[0])

    def _finish_fn(self, trainable: Params, frozen: Params, x: jax.Array, batch: Batch) -> LossSums:
        with bound(self._model, trainable, frozen):
            hidden = run_with(self._backbone, batch.token_ids, batch.segment_ids, batch.positions, lambda _, named: x)
            return self._loss_of_hidden(trainable, frozen, hidden, batch)

    def _loss_and_sums(self, trainable: Params, frozen: Params, x: jax.Array, batch: Batch) -> tuple[Any, LossSums]:
        sums = self._finish_fn(trainable, frozen, x, batch)
        return sums.loss_sum, sums

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


def _compile(begin: Any, forward: dict, finish: Any, backward: dict, begin_backward: Any, held_bytes: int) -> _Programs:
    """Compiles what was traced, several at a time."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        tree = begin, forward, finish, backward, begin_backward
        compiled = jax.tree.map(
            lambda program: program.result(), jax.tree.map(lambda traced: pool.submit(traced.lower().compile), tree)
        )
    memories = [memory_of(program) for program in jax.tree.leaves(compiled)]
    most = max(memory.total_bytes - memory.argument_bytes for memory in memories)
    begin, forward, finish, backward, begin_backward = compiled
    memory = StepMemory(0, held_bytes + most, held_bytes + most)
    return _Programs(begin, forward, finish, backward, begin_backward, memory)


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
