"""Tests of the fingerprint of a base model."""

from helpers.lora import with_lora

from gemma_tune.models.base_fingerprint import fingerprint


def test_the_fingerprint_is_the_bases_not_the_precisions(tiny, rng):
    base = fingerprint(tiny("gemma3"))
    assert fingerprint(tiny("gemma3", precision="bfloat16")) == base
    assert fingerprint(with_lora(tiny("gemma3"), rng, {})) == base
    assert len({base, fingerprint(tiny("gemma3", seed=1)), fingerprint(tiny("gemma"))}) == 3
