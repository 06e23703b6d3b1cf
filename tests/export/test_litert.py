"""What LiteRT export refuses before it makes anything, and the cache taken apart; LiteRT itself is in tests/readers."""

import numpy as np
import pytest

import gemma_tune.export.litert.model as litert
from gemma_tune.errors import ModelError
from gemma_tune.export.litert.cache_arrays import cache_parts
from gemma_tune.export.litert.model import Lengths, write_litert
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import jax


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({}, {"weight_format": "int4"}, "must be one of float32, int8; got 'int4'"),
        ({}, {"lengths": Lengths(64, 64)}, "prefill must be at least 1 and below cache"),
        ({"precision": "bfloat16"}, {}, "needs a model in float32, but this one is in bfloat16"),
        ({"quant_spec": QuantSpec("int8")}, {}, "A quantized model can't be exported to LiteRT"),
    ],
)
def test_what_cannot_be_written_is_refused(tiny, tmp_path, arguments, options, message):
    with pytest.raises(ModelError, match=message):
        write_litert(tiny("gemma3", **arguments), tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_model_beyond_a_flatbuffer_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(litert, "MAX_FLATBUFFER_BYTES", 10**6)
    with pytest.raises(ModelError, match=r"has 0\.0 GB of float32 weights, but a \.tflite file holds 2 GB at most"):
        write_litert(tiny("gemma3"), tmp_path)


def test_the_cache_is_put_together_as_it_was(tiny, family, rng):
    parts = cache_parts(tiny(family), 8)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in parts.shapes.items()}
    assert list(arrays)[:3] == ["kv_cache_k_0", "kv_cache_v_0", "kv_cache_k_1"]
    again = parts.split(parts.join(arrays))
    jax.tree.map(np.testing.assert_array_equal, again, arrays)
