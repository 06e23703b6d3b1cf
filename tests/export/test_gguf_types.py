"""Rounding to GGML types: the gguf package's own reader gives values back that are as near as the type allows."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize

from gemma_tune.errors import ModelError
from gemma_tune.export.gguf.tensor_types import GGUF_SCHEMES, fitting, tensor_num_bytes, to_type, type_of


def again(values, kind):
    coded = to_type(values, kind, "w")
    assert coded.nbytes == tensor_num_bytes(values.shape, kind)
    return dequantize(coded, GGMLQuantizationType[kind]).reshape(values.shape)


@pytest.mark.parametrize(("kind", "most"), [("Q4_K", 0.075), ("Q6_K", 0.018)])
def test_k_quants_are_near(rng, kind, most):
    """Relative error of normal weights. The formats' own limits: with 15 steps over about four deviations each way of 32
    values, uniform rounding leaves some 0.27 / sqrt(12) = 0.078; with 63 steps over 16 values, a quarter of it.
    """
    values = rng.standard_normal((64, 512)).astype(np.float32)
    error = np.linalg.norm(again(values, kind) - values) / np.linalg.norm(values)
    assert 0.5 * most < error < most


@pytest.mark.parametrize(("kind", "size", "most"), [("Q4_K", 32, 0.1), ("Q6_K", 16, 0.03)])
def test_each_group_has_its_own_scale_and_lowest(rng, kind, size, most):
    """Groups of different sizes, some all negative: each is as near as any other. Exchanged ones would be far off."""
    groups = 256 // size
    widths = rng.permutation(np.linspace(1, 8, groups))[:, None]
    values = (widths * (rng.random((20, groups, size)) - rng.choice([0.2, 0.5, 1.0], (groups, 1)))).astype(np.float32)
    found = again(values.reshape(20, 256), kind).reshape(values.shape)
    error = np.linalg.norm(found - values, axis=(0, 2)) / np.linalg.norm(values, axis=(0, 2))
    assert error.max() < most


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("values", [0.0, 1.0, -1.0, 1e-30])
def test_constant_blocks(kind, values):
    block = np.full((1, 256), values, np.float32)
    np.testing.assert_allclose(again(block, kind), block, atol=1e-7, rtol=2e-3)  # float16's scale has 11 bits.


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_every_place_of_a_block_is_its_own(kind):
    """A single weight in each of the 256 places: the reader finds it there, and nothing elsewhere."""
    found = again(np.eye(256, dtype=np.float32), kind)
    np.testing.assert_allclose(found, np.eye(256), atol=2e-3)


def test_formats_are_those_of_llama_quantize():
    """The published q4_k_m file of Gemma 3 270M: 18 layers, width 640, whose rows are no multiple of 256."""
    of = lambda name, columns, layer=0: type_of(f"blk.{layer}.{name}.weight", (8, columns), "q4_k_m", 18)
    assert type_of("token_embd.weight", (8, 640), "q4_k_m", 18) == "Q8_0"
    assert (of("attn_q", 640), of("attn_output", 1024), of("ffn_up", 640)) == ("Q5_0", "Q4_K", "Q5_0")
    more = [0, 1, 4, 7, 10, 13, 15, 16, 17]
    assert [layer for layer in range(18) if of("attn_v", 640, layer) == "Q8_0"] == more
    assert [layer for layer in range(18) if of("ffn_down", 2048, layer) == "Q6_K"] == more
    assert type_of("blk.0.attn_norm.weight", (640,), "q4_0", 18) == "F32"
    assert fitting("Q8_0", 48) == "F16"


def test_what_a_format_cannot_hold_is_refused():
    with pytest.raises(ModelError, match="w has a value of 70000, but float16 ends at 65504"):
        to_type(np.full((1, 32), 7e4, np.float32), "F16", "w")
    for kind in ("F32", "Q8_0", "Q4_K"):
        with pytest.raises(ModelError, match="holds NaN or infinite values"):
            to_type(np.full((1, 256), np.nan, np.float32), kind, "w")


@pytest.mark.parametrize(("name", "scheme"), GGUF_SCHEMES.items())
def test_every_scheme_has_llama_cpps_number(name, scheme):
    """By the gguf package's own table, which is llama.cpp's."""
    wanted = "ALL_F32" if name == "f32" else f"MOSTLY_{name.upper()}"
    assert LlamaFileType(scheme.file_type).name == wanted
