"""The decoder blocks of a KerasHub backbone, apart from what comes before and after them.

A Gemma's blocks are few kinds repeated: all equal in Gemma 1, two that take turns in Gemma 2, five with a window and
one without in Gemma 3. One program for a kind can serve all of its blocks, given each block's own arrays.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gemma_tune.errors import ModelError
from gemma_tune.models.functional import hidden_states
from gemma_tune.models.layers import iter_layers
from gemma_tune.runtime.backend import keras, keras_hub

RunBlocks = Callable[[jax.Array, dict[str, Any]], jax.Array]


def block_kinds(backbone: keras_hub.models.Backbone) -> list[int]:
    """Returns for each decoder block the index of the first block that computes the same from its own variables."""
    first: dict[str, int] = {}
    return [first.setdefault(block_signature(block), index) for index, block in enumerate(backbone.transformer_layers)]


def block_signature(block: keras.layers.Layer) -> str:
    """Returns what blocks that compute the same have in common. Not `get_config`, which would import TensorFlow."""
    variables = [(variable.shape, variable.dtype, variable.trainable) for variable in block.variables]
    settings = [
        (type(layer).__name__, {name: value for name, value in vars(layer).items() if _is_setting(name, value)})
        for layer in (block, *iter_layers(block))
    ]
    return repr((variables, settings))


def _is_setting(name: str, value: Any) -> bool:
    return name != "name" and not name.startswith("_") and isinstance(value, (bool, int, float, str, tuple, type(None)))


def blocks_are_sequential(backbone: keras_hub.models.Backbone) -> bool:
    """Says whether the blocks follow one another with nothing else between them. Gemma 4's don't: each takes inputs of
    its own, and some the keys and values of another.
    """
    if not getattr(backbone, "transformer_layers", None):
        return False
    tokens = jnp.ones((1, 2), jnp.int32)
    try:
        jax.eval_shape(lambda: run_replacing_blocks(backbone, tokens, tokens, tokens, lambda x, named: x))
    except ModelError:
        return False
    return True


def run_replacing_blocks(
    backbone: keras_hub.models.Backbone, token_ids: Any, segment_ids: Any, positions: Any, run: RunBlocks
) -> jax.Array:
    """Runs a backbone, with another function in the place of all its blocks together.

    Args:
        backbone: Of Gemma 1, 2 or 3.
        token_ids, segment_ids, positions: [B, L] int32, as in a Batch.
        run: (hidden states before the first block, [B, L, D]; the arguments of every block) -> those after the last.

    Returns:
        [B, L, D] final hidden states.

    Raises:
        ModelError: The blocks are not all called alike.
    """
    seen: dict[str, Any] = {}

    def all_at_once(x: Any, **named: Any) -> Any:
        seen.update(named)
        return run(x, named)

    def nothing(x: Any, **named: Any) -> Any:
        if named.keys() != seen.keys() or any(value is not seen[name] for name, value in named.items()):
            raise ModelError(f"The blocks of {type(backbone).__name__} are not all called with the same arguments.")
        return x

    first, *others = backbone.transformer_layers
    with replaced_calls([(first, all_at_once), *((block, nothing) for block in others)]):
        return hidden_states(backbone, token_ids, segment_ids, positions)


def block_inputs(
    backbone: keras_hub.models.Backbone, token_ids: Any, segment_ids: Any, positions: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """Returns the first block's input, [B, L, D], and the arguments of all blocks. Arguments as in `run_replacing_blocks`."""
    found: list[Any] = []

    def run(x: jax.Array, named: dict[str, Any]) -> jax.Array:
        found.append((x, named))
        return x

    run_replacing_blocks(backbone, token_ids, segment_ids, positions, run)
    return found[0]


@contextlib.contextmanager
def replaced_calls(swaps: Sequence[tuple[Any, Callable]]) -> Iterator[None]:
    """Within it, layers compute with other functions, each given (layer, function)."""
    before = [(layer, layer.__dict__.get("call")) for layer, _ in swaps]
    try:
        for layer, call in swaps:
            object.__setattr__(layer, "call", call)
        yield
    finally:
        for layer, call in before:
            if call is None:
                object.__delattr__(layer, "call")
            else:
                object.__setattr__(layer, "call", call)


def run_block(block: keras.layers.Layer, values: Sequence[jax.Array], x: jax.Array, named: Mapping[str, Any]) -> Any:
    """Runs a block with other arrays in the place of its variables, in their order."""
    with keras.StatelessScope(state_mapping=list(zip(block.variables, values, strict=True))):
        return block(x, **named)
