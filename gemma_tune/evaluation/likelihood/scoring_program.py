"""Compiles a model's scores of a batch's targets: as one program, or on a CPU as one for each kind of decoder block."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from gemma_tune.evaluation.likelihood.continuation_batches import ContinuationBatch
from gemma_tune.models.attention.choice import choose_attention
from gemma_tune.models.attention.packing_masks import enable_packing
from gemma_tune.models.attention.shared_prefixes import PrefixTrees, enable_prefix_trees, prefix_trees
from gemma_tune.models.attention.swap import use_attention_kernel
from gemma_tune.models.blocks import (
    block_inputs,
    block_kinds,
    blocks_are_sequential,
    run_block,
    run_replacing_blocks,
)
from gemma_tune.models.cpu.rotary_tables import use_rotary_tables
from gemma_tune.models.functional import (
    Params,
    final_soft_cap,
    hidden_states,
    lm_head_weights,
    parameters,
    params_scope,
)
from gemma_tune.models.linear import use_plain_products
from gemma_tune.models.restored_layers import restored_layers
from gemma_tune.models.sharding.layers import batch_sharded_inputs, enable_mesh_sharding
from gemma_tune.models.sharding.placement import mesh_sharding_of
from gemma_tune.runtime.backend import is_single_cpu, keras
from gemma_tune.training.losses.cross_entropy import TargetScores, linear_target_scores
from gemma_tune.training.losses.sharded import sharded_target_scores

_ROW_LENGTH = 512  # A usual one; whether an attention kernel can be used hardly depends on it.


class ScoringProgram:
    """The compiled programs of one model, one set for each shape of batch.

    Args:
        model: CausalLM, on one device or on a mesh.

    Attributes:
        shares_prefixes: Whether the rows of a batch may be prefix trees. If not, each tree must be a single text.
        num_parts: Number P of parts of a batch's rows, each of which is computed on its own.
    """

    def __init__(self, model: keras.Model):
        self._model, self._backbone = model, model.backbone
        self._sharding = mesh_sharding_of(model.backbone)
        self._kernel = choose_attention(self._backbone, "auto", _ROW_LENGTH).kernel
        self.shares_prefixes = self._kernel != "keras"
        self.num_parts = self._sharding.shape.num_row_shards if self._sharding else 1
        self._is_split = is_single_cpu() and blocks_are_sequential(self._backbone)
        self._kinds: list[int] = []
        self._whole = jax.jit(self._scores)
        self._embed, self._head = jax.jit(self._first_input), jax.jit(self._scores_of_output)
        self._block = jax.jit(self._block_output, static_argnums=0)

    @contextlib.contextmanager
    def prepared_model(self) -> Iterator[Params]:
        """A context in which the model's layers compute batches; it gives their parameters. Later they are as before.

        Raises:
            ModelError: The model can't run on packed text.
        """
        with restored_layers(self._backbone):
            use_plain_products(self._backbone)
            use_rotary_tables(self._backbone)
            enable_packing(self._backbone)
            use_attention_kernel(self._backbone, self._kernel)
            if self.shares_prefixes:
                enable_prefix_trees(self._backbone)
            if self._sharding:
                enable_mesh_sharding(self._backbone, self._sharding)
            if self._is_split:
                self._kinds = block_kinds(self._backbone)
            groups = parameters(self._model)
            yield {**groups.trainable, **groups.frozen}

    def __call__(self, params: Params, batch: ContinuationBatch) -> TargetScores:
        """Returns the scores of a batch's targets, [P, T]; within `prepared_model`."""
        batch = self._on_devices(batch)
        if not self._is_split:
            return self._whole(params, batch)
        blocks = self._backbone.transformer_layers
        paths = [[variable.path for variable in block.variables] for block in blocks]
        inside = {path for of_block in paths for path in of_block}
        outer = {path: value for path, value in params.items() if path not in inside}
        x, arguments = self._embed(outer, batch)
        for kind, of_block in zip(self._kinds, paths, strict=True):
            x = self._block(kind, [params[path] for path in of_block], x, arguments, batch)
        return self._head(outer, x, batch)

    # Functions that are traced.

    def _scores(self, params: Params, batch: ContinuationBatch) -> TargetScores:
        sharded = batch_sharded_inputs() if self._sharding else contextlib.nullcontext()
        with params_scope(self._model, params), sharded, self._rows(batch):
            return self._scores_of_hidden(hidden_states(self._backbone, *_inputs(batch)), batch)

    def _first_input(self, params: Params, batch: ContinuationBatch) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the input of the first decoder block, and the arguments of all."""
        with params_scope(self._model, params):
            return block_inputs(self._backbone, *_inputs(batch))

    def _block_output(
        self, kind: int, values: Sequence[jax.Array], x: jax.Array, arguments: dict[str, Any], batch: ContinuationBatch
    ) -> jax.Array:
        with self._rows(batch):
            return run_block(self._backbone.transformer_layers[kind], values, x, arguments)

    def _scores_of_output(self, params: Params, x: jax.Array, batch: ContinuationBatch) -> TargetScores:
        """Returns the scores from the output of the last decoder block."""
        with params_scope(self._model, params):
            hidden = run_replacing_blocks(self._backbone, *_inputs(batch), lambda _, arguments: x)
            return self._scores_of_hidden(hidden, batch)

    def _scores_of_hidden(self, hidden: jax.Array, batch: ContinuationBatch) -> TargetScores:
        head, soft_cap = lm_head_weights(self._backbone), final_soft_cap(self._backbone)
        if self._sharding:
            places, target_ids = batch.places, batch.target_ids
            return sharded_target_scores(self._sharding, hidden, head, places, target_ids, soft_cap=soft_cap)
        of_targets = hidden.reshape(-1, hidden.shape[-1])[batch.places[0]]
        scores = linear_target_scores(of_targets, head, batch.target_ids[0], soft_cap=soft_cap)
        return jax.tree.map(lambda values: values[None], scores)

    def _rows(self, batch: ContinuationBatch) -> contextlib.AbstractContextManager:
        if not self.shares_prefixes:
            return contextlib.nullcontext()
        return prefix_trees(PrefixTrees(batch.positions, batch.ends))

    def _on_devices(self, batch: ContinuationBatch) -> ContinuationBatch:
        if not self._sharding:
            return batch
        put, rows, targets = self._sharding.put_batch, tuple(batch[:3]), tuple(batch[3:])
        return ContinuationBatch(
            *put(len(batch.token_ids), lambda start, stop: tuple(field[start:stop] for field in rows)),
            *put(len(batch.places), lambda start, stop: tuple(field[start:stop] for field in targets)),
        )


def _inputs(batch: ContinuationBatch) -> tuple[Any, Any, Any]:
    """Returns token ids, segment ids and positions: without trees, the texts of a row end at different places."""
    return batch.token_ids, batch.ends, batch.positions
