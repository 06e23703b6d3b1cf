"""Runs the decoder blocks of a KerasHub backbone apart from what comes before and after them.

The blocks of a Gemma are a few kinds that repeat: all are equal in Gemma 1, two kinds take turns in Gemma 2, and in
Gemma 3 five blocks with a window are followed by one without. A program compiled for one block serves all blocks of its
kind, given each block's own arrays.
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
    """Returns the kind of each decoder block, as the index of the first block of that kind.

    Blocks of one kind compute the same function of their inputs and variables. Gemma 3's first seven blocks give
    [0, 0, 0, 0, 0, 5, 0].
    """
    first: dict[str, int] = {}
    return [first.setdefault(block_signature(block), index) for index, block in enumerate(backbone.transformer_layers)]


def block_signature(block: keras.layers.Layer) -> str:
    """Returns a text that is the same for blocks of one kind: the shapes of their variables and their layers' settings.

    Keras's `get_config` would say as much, but imports TensorFlow.
    """
    variables = [(variable.shape, variable.dtype, variable.trainable) for variable in block.variables]
    settings = [
        (type(layer).__name__, {name: value for name, value in vars(layer).items() if _is_setting(name, value)})
        for layer in (block, *iter_layers(block))
    ]
    return repr((variables, settings))


def _is_setting(name: str, value: Any) -> bool:
    return name != "name" and not name.startswith("_") and isinstance(value, (bool, int, float, str, tuple, type(None)))


def blocks_are_sequential(backbone: keras_hub.models.Backbone) -> bool:
    """Returns whether each decoder block takes the output of the one before, and all take the same other arguments.

    Gemma 4's don't: each has inputs of its own, and some take the keys and values of another block.
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
    """Runs a backbone with one function in place of all its decoder blocks together.

    Args:
        backbone: Backbone of Gemma 1, 2 or 3.
        token_ids, segment_ids, positions: [B, L] int32 arrays, as in a Batch.
        run: (input of the first block, [B, L, D]; keyword arguments of every block) -> output of the last block.

    Returns:
        [B, L, D] final hidden states.

    Raises:
        ModelError: The blocks are called with different keyword arguments.
    """
    arguments: dict[str, Any] = {}

    def run_all(x: Any, **named: Any) -> Any:
        arguments.update(named)
        return run(x, named)

    def pass_through(x: Any, **named: Any) -> Any:
        if named.keys() != arguments.keys() or any(value is not arguments[name] for name, value in named.items()):
            raise ModelError(f"The blocks of {type(backbone).__name__} are not all called with the same arguments.")
        return x

    first, *others = backbone.transformer_layers
    with replaced_calls([(first, run_all), *((block, pass_through) for block in others)]):
        return hidden_states(backbone, token_ids, segment_ids, positions)


def block_inputs(
    backbone: keras_hub.models.Backbone, token_ids: Any, segment_ids: Any, positions: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """Returns the input of the first decoder block, [B, L, D], and the keyword arguments that all blocks take.

    Arguments and errors are those of `run_replacing_blocks`.
    """
    found: list[Any] = []

    def run(x: jax.Array, named: dict[str, Any]) -> jax.Array:
        found.append((x, named))
        return x

    run_replacing_blocks(backbone, token_ids, segment_ids, positions, run)
    return found[0]


@contextlib.contextmanager
def replaced_calls(replacements: Sequence[tuple[Any, Callable]]) -> Iterator[None]:
    """A context in which layers compute with other functions than their own `call`.

    Args:
        replacements: (layer, function) pairs.
    """
    before = [(layer, layer.__dict__.get("call")) for layer, _ in replacements]
    try:
        for layer, call in replacements:
            object.__setattr__(layer, "call", call)
        yield
    finally:
        for layer, call in before:
            if call is None:
                object.__delattr__(layer, "call")
            else:
                object.__setattr__(layer, "call", call)


def run_block(block: keras.layers.Layer, values: Sequence[jax.Array], x: jax.Array, named: Mapping[str, Any]) -> Any:
    """Runs a decoder block with other arrays in place of its variables.

    Args:
        block: Decoder block.
        values: Arrays in the order of `block.variables`.
        x: Input of the block, [B, L, D].
        named: Keyword arguments of the block.
    """
    with keras.StatelessScope(state_mapping=list(zip(block.variables, values, strict=True))):
        return block(x, **named)
