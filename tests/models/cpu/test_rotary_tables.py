"""Rotary tables give what KerasHub gives when it computes sines and cosines itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_tune.models.cpu import rotary_tables as rotary
from gemma_tune.models.cpu.rotary_tables import use_rotary_tables
from gemma_tune.models.functional import hidden_states
from gemma_tune.models.layers import iter_layers
from gemma_tune.runtime.backend import keras_hub

LENGTH = 24


def states(backbone, rng):
    tokens = jnp.asarray(rng.integers(1, 200, (2, LENGTH)), jnp.int32)
    ones, positions = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    return jax.jit(lambda: hidden_states(backbone, tokens, ones, positions))()


def rotary_layers(backbone):
    return list(iter_layers(backbone, keras_hub.layers.RotaryEmbedding))


def test_hidden_states_are_the_same(tiny, some_family):
    backbone = tiny(some_family).backbone
    before = states(backbone, np.random.default_rng(0))
    use_rotary_tables(backbone)
    after = states(backbone, np.random.default_rng(0))
    # Sines of the same angles, from another program: the last bit of float32 may differ, and grows through the blocks.
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())


def test_the_program_has_no_sines_left(tiny):
    """Except where positions are given, since those are known only at run time."""
    backbone = tiny("gemma3").backbone
    layer = rotary_layers(backbone)[0]
    x, positions = jnp.ones((1, LENGTH, 2, 8)), jnp.arange(LENGTH)

    def has_sines(positions):
        return "= sin" in str(jax.make_jaxpr(lambda x, positions: layer(x, positions=positions))(x, positions))

    assert has_sines(None)
    use_rotary_tables(backbone)
    assert has_sines(positions) and not has_sines(None)
    np.testing.assert_allclose(layer(x), layer(x, positions=positions), atol=1e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_tables_are_rounded_at_the_end(tiny, precision):
    """The tables are computed in float32: an angle of 23 in bfloat16 would be off by up to 0.06."""
    backbone = tiny("gemma3", precision=precision).backbone
    use_rotary_tables(backbone)
    cosines, sines = rotary_layers(backbone)[0]._compute_cos_sin_embedding(jnp.ones((1, LENGTH, 2, 8)))
    assert cosines.dtype == sines.dtype == precision
    angles = np.outer(np.arange(LENGTH), 10_000.0 ** -(np.arange(4) / 4))
    for table, function in ((cosines, np.cos), (sines, np.sin)):
        np.testing.assert_allclose(table[0, :, 0].astype(float), np.tile(function(angles), 2), atol=2.0**-9)


def test_layers_of_one_kind_share_a_table(tiny):
    """Gemma 3's blocks with a window have another wavelength than those without."""
    backbone = tiny("gemma3").backbone
    use_rotary_tables(backbone)
    states(backbone, np.random.default_rng(0))
    states(backbone, np.random.default_rng(1))
    layers = rotary_layers(backbone)
    tables = layers[0]._compute_cos_sin_embedding.args[1]
    assert len(tables) == len({layer.max_wavelength for layer in layers}) == 2


@pytest.mark.parametrize("most", [LENGTH * 8 - 1, LENGTH * 8])
def test_long_rows_have_none(tiny, monkeypatch, most):
    monkeypatch.setattr(rotary, "MAX_TABLE_ENTRIES", most)
    backbone = tiny("gemma3").backbone
    use_rotary_tables(backbone)
    layer = rotary_layers(backbone)[0]
    layer(jnp.ones((1, LENGTH, 2, 8)))
    assert len(layer._compute_cos_sin_embedding.args[1]) == (most == LENGTH * 8)
