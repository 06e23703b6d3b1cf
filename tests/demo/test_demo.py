"""The real Gemma 3 270M: it loads lean, knows that water boils, and learns the support desk's answers."""

import json
import subprocess
import sys

import pytest
from helpers.skips import needs_demo

pytestmark = [
    pytest.mark.demo,
    needs_demo,
]


def test_it_knows_what_a_gemma_knows():
    import gemma_tune

    model = gemma_tune.load_model("demo")
    assert model.count_params() == 268_098_176
    assert "100 degrees Celsius" in model.generate("Water boils at", max_length=16)


def test_loading_needs_little_more_than_the_weights():
    """In a process of its own: the peak stays below 0.4 GB plus 1.3 times the weights."""
    code = (
        # Keras imports these where they are installed, as for other tests: 0.15 GB that loading doesn't need.
        "import sys; sys.modules['sklearn'] = sys.modules['pandas'] = None;"
        "from gemma_tune.runtime.process_memory import peak_memory_gb; from gemma_tune.models.load import load_model;"
        "m = load_model('demo'); print(peak_memory_gb(), sum(v.value.nbytes for v in m.backbone.variables) / 1e9)"
    )
    peak, weights = map(
        float, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert peak < 0.4 + 1.3 * weights


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_quickstart_teaches_it_the_support_desks_answers(tmp_path):
    """Held-out perplexity at most a quarter of the base's, at least 15 of 20 new phrasings answered with their topic's
    answer, within 4 GB.
    """
    command = [sys.executable, "-m", "gemma_tune", "quickstart", "--json", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    print(
        {
            key: result[key]
            for key in ("minutes", "peak_memory_gb", "num_answers_right", "heldout_before", "heldout_after")
        }
    )
    assert result["heldout_after"]["perplexity"] <= result["heldout_before"]["perplexity"] / 4
    assert result["num_answers_scored"] == 20 and result["num_answers_right"] >= 15
    assert result["peak_memory_gb"] <= 4.0
    assert all(sample["tuned_answer"] != sample["base_answer"] for sample in result["samples"])
