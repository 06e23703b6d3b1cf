"""Tests of the safetensors writer: the safetensors package reads what was written."""

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from gemma_tune.runtime.safetensors_file import write_safetensors

METADATA = {"format": "pt", "b": 'ü "quoted"', "a": ""}


def test_the_safetensors_package_reads_it(rng, tmp_path):
    values = rng.normal(size=(4, 6))
    tensors = {
        "z": values.astype(np.float16),
        "transposed": values.astype(np.float32).T,
        "half": values.astype(ml_dtypes.bfloat16),
        "double": values,
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(3.0).reshape(()),
    }
    write_safetensors(tmp_path / "a.safetensors", tensors, METADATA)
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(found[name], value)
    with safe_open(tmp_path / "a.safetensors", framework="np") as opened:
        assert opened.metadata() == METADATA


def test_the_order_of_what_is_given_does_not_count(rng, tmp_path):
    tensors = {name: rng.normal(size=3).astype(np.float32) for name in "bca"}
    write_safetensors(tmp_path / "one", tensors, METADATA)
    write_safetensors(tmp_path / "two", dict(reversed(tensors.items())), dict(reversed(METADATA.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
