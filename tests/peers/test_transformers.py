"""Live comparisons with transformers on CPU torch: `pip install -e '.[peers,demo]'`, then `pytest -m 'peers or demo'`."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.skips import needs, needs_demo

pytestmark = [
    pytest.mark.peers,
    needs("transformers", "peers"),
]
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def make_golden():
    sys.path.insert(0, str(GOLDEN))
    import make_golden

    return make_golden


@pytest.fixture(scope="module")
def demo_peer(make_golden):
    return make_golden.load_demo()


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "gemma4"])
def test_the_golden_files_are_what_transformers_gives_now(make_golden, family):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / family, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor(make_golden.TOKEN_IDS)).logits.numpy()
    np.testing.assert_allclose(logits, np.load(GOLDEN / family / "logits.npy"), atol=1e-4)


@needs_demo
@pytest.mark.demo
def test_the_demo_golden_file_is_what_transformers_gives_now(make_golden, demo_peer):
    wanted = json.loads((GOLDEN / "gemma3_270m.json").read_text())["rows"]
    for row, now in zip(wanted, make_golden.describe_demo(*demo_peer)["rows"], strict=True):
        assert (row["text"], row["ids"], row["top_ids"][:5]) == (now["text"], now["ids"], now["top_ids"][:5])
        assert row["loss"] == pytest.approx(now["loss"], abs=1e-4)


@needs_demo
@pytest.mark.demo
def test_the_loss_of_one_batch_equals_transformers(demo_peer):
    """Packed, response tokens only, in blocks of the vocabulary: ours. Padded, all logits: theirs.

    Same weights and tokens, to 1e-3.
    """
    import torch

    from gemma_tune.data import load_examples, make_batch, template_for
    from gemma_tune.data.tokenize import tokenize_examples
    from gemma_tune.models.attention.packing_masks import enable_packing
    from gemma_tune.models.functional import parameters
    from gemma_tune.models.load import load_model
    from gemma_tune.models.sources.tokenizer import tokenizer_of
    from gemma_tune.training.step.train_step import make_eval_step

    model = load_model("demo")
    examples = load_examples("sample:smartphone_support")[:8]
    tokens = tokenize_examples(examples, template_for("gemma3"), tokenizer_of(model), 512, "truncate").examples
    enable_packing(model.backbone)
    batch = make_batch([tokens], 1, 512)
    groups = parameters(model)
    sums = make_eval_step(model, int(batch.loss_weights.sum()))(groups.trainable, groups.frozen, batch)
    ours = float(sums.loss_sum / sums.weight_sum)

    peer, peer_tokenizer = demo_peer
    length = max(len(example.token_ids) for example in tokens)
    ids = torch.zeros((8, length), dtype=torch.long)
    labels = torch.full((8, length), -100)
    mask = torch.zeros((8, length), dtype=torch.long)
    for row, example in enumerate(tokens):
        text = template_for("gemma3").render(examples[row].turns).removeprefix("<bos>")
        whole = [peer_tokenizer.bos_token_id, *peer_tokenizer(text, add_special_tokens=False)["input_ids"]]
        n = len(example.token_ids)
        assert whole[:n] == example.token_ids.tolist()  # Their tokenizer gives the same ids.
        ids[row, :n] = torch.tensor(example.token_ids)
        mask[row, :n] = 1
        labels[row, :n] = torch.where(torch.tensor(example.is_target), ids[row, :n], -100)
    with torch.no_grad():
        theirs = float(peer(input_ids=ids, attention_mask=mask, labels=labels).loss)
    assert ours == pytest.approx(theirs, abs=1e-3)
