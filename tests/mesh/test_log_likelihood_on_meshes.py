"""Log-likelihoods on a mesh equal those of one device."""

import numpy as np
import pytest

from gemma_tune.evaluation.likelihood.log_likelihood import log_likelihoods
from gemma_tune.models.load import load_model
from gemma_tune.models.sharding.placement import make_mesh_sharding, mesh_sharding_of
from gemma_tune.quantization.spec import QuantSpec


def on_mesh(mesh, quant_spec):
    return load_model("tiny", quant_spec=quant_spec, sharding=make_mesh_sharding(mesh, 8) if mesh else None)


@pytest.mark.parametrize(
    "mesh, quant_spec",
    [
        pytest.param("data:2", None, marks=pytest.mark.nightly),
        ("data:2,fsdp:2,model:2", QuantSpec("int8")),
        *(
            pytest.param(mesh, spec, marks=pytest.mark.nightly)
            for mesh in ("fsdp:8", "model:4", "data:2,fsdp:2,model:2")
            for spec in (None, QuantSpec("nf4", 32, double=True))
        ),
    ],
    ids=str,
)
def test_equal_to_one_device(mesh, quant_spec):
    rng = np.random.default_rng(0)
    sizes = [(int(rng.integers(3, 60)), int(rng.integers(1, 20))) for _ in range(40)] + [(600, 7)]
    pairs = [([2, *rng.integers(10, 250, n).tolist()], rng.integers(10, 250, m).tolist()) for n, m in sizes]
    pairs += [(pairs[0][0], [token]) for token in (20, 21, 22)]
    pairs += [(context, rng.integers(10, 250, 9).tolist()) for context, _ in pairs[:10]]  # Branches of one tree.
    one = log_likelihoods(on_mesh("", quant_spec), pairs)
    model = on_mesh(mesh, quant_spec)
    assert mesh_sharding_of(model.backbone) is not None
    several = log_likelihoods(model, pairs)
    differences = [abs(a.log_prob - b.log_prob) for a, b in zip(one, several, strict=True)]
    assert max(differences) < 1e-4 and [a.is_greedy for a in one] == [b.is_greedy for b in several]
    assert len({round(each.log_prob, 3) for each in one}) > 40  # A control: the scores differ from each other.
