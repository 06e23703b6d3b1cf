"""`export --format=hf` as its readers see it: transformers' logits, token ids and chat template equal ours."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.logits import logits_of
from helpers.skips import needs, needs_demo
from helpers.variants import shake, variant

from gemma_tune.data import Turn, template_for
from gemma_tune.export import export_model
from gemma_tune.export.options import ExportOptions
from gemma_tune.models.load import load_model
from gemma_tune.models.sources.tokenizer import tokenizer_of

pytestmark = [
    pytest.mark.peers,
    needs("transformers", "peers"),
]
TEXTS = (
    "How do I reset my smartphone?",
    "<start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n",
    "<|turn>user\nHi there<turn|>\n<|turn>model\n",
    "Größe  —  日本語 🙂\n\n\tdef f(x):\n        return x**2  # 100%",
    " leading and trailing   ",
    "\n\n\n a\n \n\t\t  ▁▁ <unk <pad",
    "",
)
CONVERSATIONS = (
    [("user", "Hi")],
    [("user", " Hi \n"), ("model", "Hello.\n"), ("user", "How are you?")],
    [("system", "Be kind. "), ("user", "Hi"), ("model", "Hello {{ there }}")],
)


def peer_logits(folder, ids, dtype=None):
    import torch
    import transformers

    peer, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=dtype or torch.float32
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        return peer.eval()(torch.tensor(ids.astype(np.int64))).logits.float().numpy()


def check_tokenizer(peer, tokenizer, template):
    import transformers

    assert isinstance(peer, transformers.PreTrainedTokenizerBase)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert peer(text, add_special_tokens=False)["input_ids"] == ids, text
        assert peer(text)["input_ids"] == [tokenizer.bos_id, *ids]
        assert peer.decode(ids) == tokenizer.decode(ids)
    for turns in CONVERSATIONS:
        for is_open in (False, True):
            wanted = template.render([Turn(*turn) for turn in turns], add_generation_prompt=is_open)
            messages = [
                {"role": "assistant" if role == "model" else role, "content": content} for role, content in turns
            ]
            found = peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_open)
            assert found == wanted
            ids = peer.apply_chat_template(messages, add_generation_prompt=is_open)["input_ids"]
            assert ids == [tokenizer.bos_id, *tokenizer.encode(wanted.removeprefix(template.bos))]


def test_logits_and_tokens_are_the_same(tiny, family, rng, tmp_path):
    import transformers

    model = tiny(family)
    shake(model, rng)
    ids = rng.integers(4, 1000, (2, 40), dtype=np.int32)
    export_model(model, "hf", tmp_path / "hf")
    ours, theirs = logits_of(model, ids), peer_logits(tmp_path / "hf", ids)
    np.testing.assert_allclose(theirs, ours, atol=1e-4 * np.abs(ours).max())
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    check_tokenizer(peer, tokenizer_of(model), template_for(family))
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert peer.convert_ids_to_tokens(settings.eos_token_id) == ["<eos>", template_for(family).end_of_turn]


def test_a_reader_of_config_json_alone_stops(tiny, rng, tmp_path):
    """generate() without generation_config.json ends at a turn's end, and goes on if config.json has <eos> alone."""
    import torch
    import transformers

    model = tiny("gemma3")
    shake(model, rng)
    export_model(model, "hf", tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink()
    ids = torch.tensor(rng.integers(10, 1000, (1, 12)))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    end = config["eos_token_id"][1]

    def answer():
        peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
        rows = peer.get_input_embeddings().weight.data
        rows[end] = 40 * peer.model(ids).last_hidden_state[0, -1].detach()  # The next token is the end of a turn.
        return peer.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()

    assert answer() == [end]
    config["eos_token_id"] = config["eos_token_id"][0]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert answer()[0] == end and len(answer()) == 6


VARIANTS = {
    "several key and value heads": ("gemma", {"num_key_value_heads": 4}),
    "scale of 27B": ("gemma2", {"query_head_dim_normalize": False, "num_query_heads": 2, "num_key_value_heads": 1}),
    "of 4B": ("gemma3", {"num_key_value_heads": 2, "global_rope_scaling_factor": 8.0}),
    "of 27B": ("gemma3", {"query_head_dim_normalize": False, "num_query_heads": 2, "num_layers": 7}),
    "of 31B": ("gemma4", {"num_global_key_value_heads": 1, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}),
    "of 26B": ("gemma4", {
        "num_global_key_value_heads": 1, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
        "enable_moe_block": True, "num_experts": 4, "expert_intermediate_dim": 24, "num_experts_per_token": 2,
    }),
    "of E2B": ("gemma4", {"use_double_wide_mlp": True, "num_key_value_heads": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("family", "sizes"), VARIANTS.values(), ids=VARIANTS.keys())
def test_what_published_sizes_have(rng, tmp_path, family, sizes):
    """Each of them in a tiny model: equal to transformers, and to itself when read back."""
    model = variant(family, **sizes)
    shake(model, rng)
    ids = rng.integers(4, 1000, (2, 40), dtype=np.int32)
    export_model(model, "hf", tmp_path / "hf")
    ours = logits_of(model, ids)
    np.testing.assert_array_equal(logits_of(load_model(str(tmp_path / "hf")), ids), ours)
    np.testing.assert_allclose(peer_logits(tmp_path / "hf", ids), ours, atol=2e-4 * np.abs(ours).max())


@needs_demo
@pytest.mark.demo
def test_the_real_model_is_the_same(tmp_path):
    import transformers

    model = load_model("demo")
    export_model(model, "hf", tmp_path / "hf", options=ExportOptions(max_shard_size="300MB"))
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    tokenizer = tokenizer_of(model)
    text = "The capital of France is Paris, and water boils at 100 degrees Celsius. <end_of_turn>\n日本語 🙂"
    ids = np.array([[tokenizer.bos_id, *tokenizer.encode(text)]], np.int32)
    # float32 through 18 layers by two frameworks, on logits of order 10.
    np.testing.assert_allclose(peer_logits(tmp_path / "hf", ids), logits_of(model, ids), atol=2e-3)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    check_tokenizer(peer, tokenizer, template_for("gemma3"))
    for row in (Path(__file__).parents[2] / "README.md").read_text().splitlines():
        assert peer(row, add_special_tokens=False)["input_ids"] == tokenizer.encode(row)
