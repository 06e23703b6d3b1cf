"""The tiny models cover what they are for, and are the same everywhere."""

import numpy as np
import pytest

from gemma_tune.errors import ModelError
from gemma_tune.models.family import family_of
from gemma_tune.models.functional import parameters, variables_by_path
from gemma_tune.models.sources.tiny import TOKENIZER_PATH
from gemma_tune.models.sources.tokenizer import tokenizer_of


def test_seeded_weights(tiny, family):
    first, again, other = (parameters(tiny(family, seed=seed)).trainable for seed in (0, 0, 1))
    assert all(np.array_equal(first[path], again[path]) for path in first)
    assert any(not np.array_equal(first[path], other[path]) for path in first)


def test_the_families_cover_heads_windows_and_caps(tiny):
    backbones = {family: tiny(family).backbone for family in ("gemma", "gemma2", "gemma3", "gemma4")}
    assert {backbone.num_key_value_heads for backbone in backbones.values()} == {1, 2}
    assert backbones["gemma2"].final_logit_soft_cap and backbones["gemma2"].attention_logit_soft_cap
    for family in ("gemma2", "gemma3", "gemma4"):
        assert {block.attention.use_sliding_window_attention for block in backbones[family].transformer_layers} == {
            True,
            False,
        }
    assert any(block.is_kv_shared_layer for block in backbones["gemma4"].transformer_layers)


def test_family_is_recognised(tiny, family):
    assert family_of(tiny(family)) == family


def test_it_is_tiny(tiny, family):
    assert sum(variable.value.size for variable in variables_by_path(tiny(family)).values()) < 500_000
    assert TOKENIZER_PATH.stat().st_size < 100_000


def test_the_tokenizer_has_gemmas_special_tokens_in_their_roles(tiny):
    tokenizer = tokenizer_of(tiny())
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    ids = tokenizer.encode("<start_of_turn>user\nä  日<end_of_turn>\n")
    assert ids[0] == tokenizer.id_of("<start_of_turn>") and ids[-2] == tokenizer.id_of("<end_of_turn>")
    assert tokenizer.decode(ids) == "<start_of_turn>user\nä  日<end_of_turn>\n"
    assert tokenizer.encode("a") == [tokenizer.encode("a")[0]]  # No dummy prefix.
    with pytest.raises(ModelError, match="no token '<absent>'"):
        tokenizer.id_of("<absent>")


def test_an_unknown_tiny_is_refused(tiny):
    with pytest.raises(ModelError, match="There is no model 'tiny:gemma33'.*Did you mean tiny:gemma3"):
        tiny("gemma33")
