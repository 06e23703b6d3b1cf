"""`gemma-tune export` of a run: what is written, and mistakes that write nothing."""

import json

import pytest
from cli_arguments import FAST, TINY  # noqa: F401
from huggingface_hub import ModelCard


@pytest.fixture(scope="module")
def results(trained):
    return json.loads((trained / "result.json").read_text())


@pytest.mark.parametrize(("name", "library"), [("keras", "keras-hub"), ("hf", "transformers")])
def test_a_run_is_exported_with_a_card(call, trained, results, tmp_path, name, library):
    output = tmp_path / "mine"
    code, out, err = call("export", f"--model={trained}", f"--format={name}", f"--output={output}", "--json", "--datasets=me/support")
    assert code == 0, err
    assert "TensorFlow" not in err and "oneDNN" not in err and "Traceback" not in err
    done = json.loads(out)
    assert done["bytes"] == sum((output / file).stat().st_size for file in done["files"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    card = ModelCard.load(output / "README.md")
    data = card.data
    print(card.content)
    assert (data.license, data.library_name, data.datasets, data.language) == ("apache-2.0", library, ["me/support"], ["en"])
    values = {one.metric_type: one.metric_value for one in data.eval_results}
    wanted = results["heldout_after"]
    assert values == pytest.approx({"loss": wanted["loss"], "perplexity": wanted["perplexity"], "accuracy": wanted["token_accuracy"]}, abs=1e-6)
    versions = json.loads((trained / "versions.json").read_text())
    for text in (versions["data"], "train.jsonl", "lora.rank", "learning_rate", results["samples"][0]["question"], output.name):
        assert text in card.content
    code, out, err = call("generate", f"--model={output}", "--max_new_tokens=3", "How do I reset my phone?")
    assert code == 0, err
