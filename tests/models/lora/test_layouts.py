"""Tests of converting whole models from one layout to the other."""

import numpy as np
import pytest
from helpers.logits import logits
from helpers.lora import METHODS, with_lora

from gemma_tune.models.lora.enable import lora_specs
from gemma_tune.models.lora.layouts import convert_layout


@pytest.mark.parametrize("method", [METHODS["peft-rslora"], METHODS["keras-rslora-dora"]], ids=["peft", "keras"])
def test_a_layout_becomes_the_other(tiny, some_family, rng, method):
    model = with_lora(
        tiny(some_family), rng, method, ("all-linear",) if method.get("use_dora") else ("all-linear", "token_embedding")
    )
    before, kinds = logits(model), lora_specs(model.backbone)
    other = "keras" if method["layout"] == "peft" else "peft"
    convert_layout(model.backbone, other)
    assert {kind.layout for kind in lora_specs(model.backbone).values()} == {other}
    np.testing.assert_allclose(logits(model), before, atol=2e-4)
    convert_layout(model.backbone, method["layout"])
    np.testing.assert_allclose(logits(model), before, atol=2e-4)
    if method["layout"] == "keras":
        assert {path: kind.rank for path, kind in lora_specs(model.backbone).items()} == {
            p: k.rank for p, k in kinds.items()
        }
