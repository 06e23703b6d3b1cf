"""Keras presets: what a fresh process with KerasHub alone reads computes the same."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers.logits import logits_of
from helpers.lora import with_lora

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError, ModelError
from gemma_tune.export import export_model
from gemma_tune.export.card.provenance import Provenance, read_provenance
from gemma_tune.export.options import EXPORT_MARKER
from gemma_tune.models.functional import variables_by_path
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.load import load_model
from gemma_tune.models.lora.adapter import save_adapter
from gemma_tune.quantization.spec import QuantSpec

TARGETS = ("query", "value", "ffw_gating")
READ_BY_KERAS_HUB = """
import os, sys
os.environ["KERAS_BACKEND"] = "jax"
import keras_hub, numpy as np
model = getattr(keras_hub.models, sys.argv[4]).from_preset(sys.argv[1])
ids = np.load(sys.argv[2])
inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids), "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape)}
inputs = {name: inputs[name] for name in model.backbone.input}
np.save(sys.argv[3], np.asarray(model(inputs)))
assert "gemma_tune" not in sys.modules
"""


@pytest.fixture
def ids(rng):
    return rng.integers(4, 1000, (2, 24), dtype=np.int32)


@pytest.mark.nightly
def test_keras_hub_alone_reads_it_in_a_fresh_process(tiny, some_family, rng, ids, tmp_path):
    model = with_lora(tiny(some_family), rng, {}, TARGETS)
    export_model(model, "keras", tmp_path / "keras")
    np.save(tmp_path / "ids.npy", ids)
    arguments = [*(str(tmp_path / name) for name in ("keras", "ids.npy", "logits.npy")), type(model).__name__]
    done = subprocess.run(
        [sys.executable, "-c", READ_BY_KERAS_HUB, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = logits_of(model, ids)
    # W + s·A·B in one float32 product there, x·W + s·(x·A)·B here.
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), wanted, atol=1e-4 * np.abs(wanted).max())
    plain = logits_of(tiny(some_family), ids)
    assert np.abs(plain - wanted).max() > 1e-2 * np.abs(wanted).max()  # Negative control: LoRA does something.


def test_the_model_stays_as_it_is(tiny, rng, ids, tmp_path):
    model = with_lora(tiny(), rng, {}, TARGETS)
    before = {path: variable.value for path, variable in variables_by_path(model).items()}
    export_model(model, "keras", tmp_path / "keras")
    after = {path: variable.value for path, variable in variables_by_path(model).items()}
    assert before.keys() == after.keys() and all(before[path] is after[path] for path in before)
    assert lora_layers(model.backbone)


def test_lora_beside_the_base(tiny, rng, ids, tmp_path):
    model = with_lora(tiny(), rng, {}, TARGETS)
    wanted = logits_of(model, ids)
    done = export_model(model, "keras", tmp_path / "keras", merge=False)
    assert "adapter/adapter.safetensors" in done.files
    base = load_model(str(tmp_path / "keras"))
    np.testing.assert_array_equal(logits_of(base, ids), logits_of(tiny(), ids))
    tuned = load_model(str(tmp_path / "keras"), adapter=str(tmp_path / "keras" / "adapter"))
    np.testing.assert_allclose(logits_of(tuned, ids), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("way", [{"layout": "peft"}, {"layout": "peft", "use_dora": True}, {"use_rslora": True}])
def test_every_kind_of_lora_is_merged(tiny, rng, ids, tmp_path, way):
    model = with_lora(tiny(), rng, way, TARGETS)
    wanted = logits_of(model, ids)
    for name in ("keras", "hf"):
        export_model(model, name, tmp_path / name)
        found = logits_of(load_model(str(tmp_path / name)), ids)
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_quantized_stays_quantized(tiny, ids, tmp_path):
    model = tiny(quant_spec=QuantSpec("int4", 32))
    done = export_model(model, "keras", tmp_path / "keras")
    assert done.notes == ["The weights are quantized: gemma_tune loads them, KerasHub alone doesn't."]
    assert "keras_hub" not in (tmp_path / "keras" / "README.md").read_text()
    again = load_model(str(tmp_path / "keras"))
    for path, variable in variables_by_path(model).items():
        np.testing.assert_array_equal(np.asarray(variables_by_path(again)[path].value), np.asarray(variable.value))
    np.testing.assert_array_equal(logits_of(again, ids), logits_of(model, ids))


def test_the_card_may_be_edited_but_not_the_weights(tiny, tmp_path):
    export_model("tiny", "keras", tmp_path / "keras")
    with open(tmp_path / "keras" / "README.md", "a") as file:
        file.write("More.\n")
    load_model(str(tmp_path / "keras"))
    with open(tmp_path / "keras" / "model.weights.h5", "ab") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match="is damaged"):
        load_model(str(tmp_path / "keras"))


def test_an_adapter_of_another_base_is_an_error(tiny, rng, tmp_path):
    save_adapter(with_lora(tiny(), rng, {}, TARGETS), tmp_path / "adapter", base_model="tiny")
    with pytest.raises(ModelError, match="was trained on another base"):
        export_model("tiny", "keras", tmp_path / "out", adapter=str(tmp_path / "adapter"), seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_lora_that_a_format_cannot_hold(tmp_path):
    with pytest.raises(ConfigError, match="holds LoRA merged"):
        export_model("tiny", "hf", tmp_path / "out", merge=False)
    with pytest.raises(ConfigError, match=r"format must be one of .*; got 'kears'\. Did you mean keras"):
        export_model("tiny", "kears", tmp_path / "out")


def test_an_export_says_where_it_comes_from(tmp_path):
    """Also one of an earlier version, whose marker has the key `origin`."""
    export_model("tiny", "keras", tmp_path / "one")
    export_model(str(tmp_path / "one"), "hf", tmp_path / "two")
    marker = json.loads((tmp_path / "two" / EXPORT_MARKER).read_text())
    assert marker["format"] == "hf" and marker["provenance"]["base"] == "tiny"
    wanted = Provenance(
        "tiny", Config().to_dict(), {"best_step": 3}, {"jax": "0.10"}, {"rank": "4"}, {"a.jsonl": "f00d"}
    )
    for key in ("provenance", "origin"):
        earlier = {"format": "hf", "gemma_tune": "0.0.1", "notes": [], key: {**wanted.to_dict(), "unknown": 1}}
        (tmp_path / "two" / EXPORT_MARKER).write_text(json.dumps(earlier))
        assert read_provenance(str(tmp_path / "two")) == wanted
