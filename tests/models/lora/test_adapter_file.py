"""Tests of adapter files: equal adapters are equal byte for byte, in any process."""

import json
import os
import subprocess
import sys

import numpy as np

from gemma_tune.models.lora.adapter_file import lora_metadata, read_adapter
from gemma_tune.models.lora.factors import LoraSpec

BASE = {"family": "gemma3", "base_model": "tiny", "base_fingerprint": "0123456789abcdef", "base_values": "{}"}
METADATA = {**BASE, **lora_metadata({"a": LoraSpec("peft", 2, 3.0)}, {"a": "query"})}
WRITE = """
import json, pathlib, sys
import numpy as np
from gemma_tune.models.lora.adapter_file import write_adapter
metadata = json.loads(sys.argv[2])
factors = {f"layer_{i}/lora_kernel_{part}": np.full((2, 4 + i), i, "float32") for i in range(4) for part in "ab"}
if sys.argv[3] == "reversed":
    metadata, factors = (dict(reversed(one.items())) for one in (metadata, factors))
write_adapter(pathlib.Path(sys.argv[1]), metadata, factors)
"""


def test_equal_adapters_are_equal_byte_for_byte(tmp_path):
    files = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, str(file), json.dumps(METADATA), order],
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for file, order, seed in zip(files, ("as they are", "reversed"), ("1", "2"), strict=True)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert files[0].read_bytes() == files[1].read_bytes()
    metadata, factors = read_adapter(files[0])
    assert METADATA.items() <= metadata.items()
    np.testing.assert_array_equal(factors["layer_3/lora_kernel_b"], np.full((2, 7), 3))
