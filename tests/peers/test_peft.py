"""PEFT reads what we write, and we read what it writes: `pip install -e '.[peers]'`, then `pytest -m peers`."""

import dataclasses
import shutil
import warnings

import numpy as np
import pytest
from helpers.logits import logits_of
from helpers.lora import METHODS, randomize_b, with_lora
from helpers.skips import needs

from gemma_tune.config import Config
from gemma_tune.export.peft.adapter import write_peft_adapter
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.load import load_model
from gemma_tune.models.lora.enable import enable_on_layers, layers_with_weights, lora_specs
from gemma_tune.models.lora.factors import LoraSpec
from gemma_tune.models.sources.tiny import TOKENIZER_PATH

pytestmark = [
    pytest.mark.peers,
    needs("peft", "peers"),
]
SIZES = {
    "vocab_size": 1024, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 48, "num_hidden_layers": 2,
    "tie_word_embeddings": True, "initializer_range": 0.3, "query_pre_attn_scalar": 16, "sliding_window": 8, "attn_implementation": "eager",
}  # fmt: skip
CONFIGS = {"gemma": "GemmaConfig", "gemma2": "Gemma2Config", "gemma3": "Gemma3TextConfig"}
BASES = [("gemma", 1), ("gemma2", 2), ("gemma3", 1), ("gemma3", 4)]


def some(cases, often):
    """All cases, those that aren't `often` among the tests that take minutes."""
    return [pytest.param(*case, marks=() if case in often else pytest.mark.nightly) for case in cases]


TOKEN_IDS = np.array([[2, 5, 9, 11, 60, 33, 7, 21, 22, 48, 13, 5, 9, 11, 60, 33, 7, 21, 22, 48, 13, 63]], np.int32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Makes a random Gemma as transformers saves it, with our tiny tokenizer."""

    def make(family, num_kv_heads):
        import torch
        import transformers

        folder = tmp_path_factory.getbasetemp() / f"{family}-{num_kv_heads}"
        if not folder.exists():
            torch.manual_seed(0)
            config = getattr(transformers, CONFIGS[family])(**SIZES, num_key_value_heads=num_kv_heads)
            transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
            shutil.copy(TOKENIZER_PATH, folder / "tokenizer.model")
        return folder

    return make


def transformers_model(folder):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def their_logits(folder, adapter):
    import peft
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("error", message=".*unexpected.*")
        model = peft.PeftModel.from_pretrained(transformers_model(folder), str(adapter)).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKEN_IDS).long()).logits.numpy()


def our_logits(model, token_ids=TOKEN_IDS):
    return logits_of(model, token_ids)


def assert_same(ours, theirs):
    # As in test_golden: float32 through a few layers, by two frameworks.
    np.testing.assert_allclose(ours, theirs, atol=2e-4 * max(1.0, np.abs(theirs).max()))


def written(model, folder, base):
    folder.mkdir()
    write_peft_adapter(model, folder, str(base))
    return folder


@pytest.mark.parametrize(
    ("family", "num_kv_heads", "method"),
    some(
        [(*base, method) for base in BASES for method in (*METHODS, "keras")],
        [("gemma", 1, "peft"), ("gemma2", 2, "keras"), ("gemma3", 1, "keras-rslora-dora"), ("gemma3", 4, "peft-dora")],
    ),
)
def test_peft_reads_what_we_write(base, rng, tmp_path, family, num_kv_heads, method):
    folder = base(family, num_kv_heads)
    model = load_model(str(folder))
    before = our_logits(model)
    with_lora(model, rng, METHODS.get(method, {}))
    ours = our_logits(model)
    assert np.abs(ours - before).max() > 0.1  # A control: the factors matter.
    assert_same(ours, their_logits(folder, written(model, tmp_path / "a", folder)))


@pytest.mark.parametrize(("family", "num_kv_heads"), some(BASES, [("gemma3", 1)]))
def test_peft_reads_factors_of_the_embedding(base, rng, tmp_path, family, num_kv_heads):
    folder = base(family, num_kv_heads)
    model = with_lora(load_model(str(folder)), rng, {"layout": "keras"}, ("token_embedding", "query"))
    adapter = written(model, tmp_path / "a", folder)
    assert_same(our_logits(model), their_logits(folder, adapter))
    assert_same(our_logits(load_model(str(folder), adapter=str(adapter))), our_logits(model))


def trained_by_peft(folder, adapter, **settings):
    """Trains an adapter with PEFT for a few steps, saves it, and returns its logits."""
    import peft
    import torch

    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", lora_dropout=0.1, **settings)
    model = peft.get_peft_model(transformers_model(folder), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    ids = torch.tensor(TOKEN_IDS).long()
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(adapter)
    with torch.no_grad():
        return model.eval()(ids).logits.numpy()


SETTINGS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "o_proj", "down_proj"], "use_dora": True},
    "patterns": {
        "target_modules": r".*\.(k_proj|up_proj|gate_proj)",
        "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"up_proj": 3},
    },
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize(
    ("family", "num_kv_heads", "name"),
    some(
        [(*base, name) for base in BASES for name in SETTINGS],
        [("gemma", 1, "patterns"), ("gemma2", 2, "dora"), ("gemma3", 4, "all-linear"), ("gemma3", 1, "one layer")],
    ),
)
def test_we_read_what_peft_trained_and_it_comes_back(base, tmp_path, family, num_kv_heads, name):
    folder = base(family, num_kv_heads)
    theirs = trained_by_peft(folder, tmp_path / "theirs", **SETTINGS[name])
    model = load_model(str(tmp_path / "theirs"))  # It says its base.
    assert_same(our_logits(model), theirs)
    assert_same(their_logits(folder, written(model, tmp_path / "back", folder)), theirs)


@pytest.mark.parametrize("name", some([("plain",), ("dora",), ("patterns",)], [("dora",)]))
def test_what_peft_trained_goes_on_training_here(base, tmp_path, name):
    from gemma_tune.pipeline import run_training

    folder = base("gemma3", 1)
    trained_by_peft(folder, tmp_path / "theirs", **SETTINGS[name])
    before = load_model(str(folder), adapter=str(tmp_path / "theirs"))
    config = Config().replace({
        "workdir": str(tmp_path / "run"), "model.source": str(folder), "model.adapter": str(tmp_path / "theirs"),
        "data.max_length": 64, "training.num_train_steps": 3, "training.num_sample_answers": 0, "training.num_scored_answers": 0,
        "optimizer.learning_rate": 0.01, "lora.loraplus_lr_ratio": 2.0,
    })  # fmt: skip
    result = run_training(config)
    assert lora_specs(result.model.backbone) == lora_specs(before.backbone)
    assert result.num_trainable == sum(
        int(np.prod(variable.shape)) for layer in lora_layers(before.backbone) for variable in layer.trainable_variables
    )
    assert np.abs(our_logits(result.model) - our_logits(before)).max() > 0.05
    again = load_model(config.workdir)
    assert_same(our_logits(again), our_logits(result.model))
    assert_same(their_logits(folder, written(again, tmp_path / "back", folder)), our_logits(result.model))
    assert dataclasses.asdict(config.lora)["rank"] == 4


@pytest.mark.nightly
def test_modules_of_a_model_that_also_sees_have_other_names(rng, tmp_path):
    """Its vision tower has q_proj too, and gets nothing."""
    import peft
    import torch
    import transformers

    folder = tmp_path / "base"
    text = {key: value for key, value in SIZES.items() if key != "attn_implementation"}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config={**text, "num_key_value_heads": 2}, vision_config=vision, mm_tokens_per_image=4, image_token_index=9, boi_token_index=7, eoi_token_index=8,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(folder)
    shutil.copy(TOKENIZER_PATH, folder / "tokenizer.model")
    model = with_lora(load_model(str(folder)), rng, METHODS["peft"])
    adapter = written(model, tmp_path / "a", folder)
    ids = np.where(np.isin(TOKEN_IDS, (7, 8, 9)), 10, TOKEN_IDS)
    theirs = peft.PeftModel.from_pretrained(whole, str(adapter)).eval()
    with torch.no_grad():
        theirs = theirs(input_ids=torch.tensor(ids).long(), attention_mask=torch.ones(ids.shape)).logits.numpy()
    assert_same(our_logits(model, ids), theirs)
    again = load_model(str(adapter))
    assert_same(our_logits(again, ids), theirs)


def test_ours_begins_as_peft_begins(base, tmp_path):
    """DoRA's magnitudes are the norms, and A keeps within PEFT's bounds."""
    import peft

    from gemma_tune.models.lora.enable import enable_lora

    folder = base("gemma3", 4)
    model = load_model(str(folder))
    enable_lora(model.backbone, 4, 8.0, ("query",), 0, "peft", use_dora=True)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=True)
    theirs = peft.get_peft_model(transformers_model(folder), config).state_dict()
    start = "base_model.model.model.layers.0.self_attn.q_proj"
    layer = model.backbone.transformer_layers[0].attention.query_dense
    magnitude = theirs[f"{start}.lora_magnitude_vector.default.weight"].numpy()
    np.testing.assert_allclose(np.ravel(layer.lora_kernel_magnitude.value), magnitude, rtol=1e-5)
    a, bound = theirs[f"{start}.lora_A.default.weight"].numpy(), 1 / np.sqrt(32)
    for one in (a, np.asarray(layer.lora_kernel_a.value)):
        assert 0.9 * bound < np.abs(one).max() <= bound


def test_an_adapter_without_a_named_base_is_put_on_any(base, rng, tmp_path):
    """A tiny model, a Keras preset or a GGUF file is no base that PEFT could load: none is named then."""
    folder = base("gemma3", 1)
    model = with_lora(load_model(str(folder)), rng, {"layout": "keras"}, ("attention", "ffw_gating"))
    (tmp_path / "adapter").mkdir()
    write_peft_adapter(model, tmp_path / "adapter", "")
    assert '"base_model_name_or_path": null' in (tmp_path / "adapter/adapter_config.json").read_text()
    ours = our_logits(model)
    np.testing.assert_allclose(their_logits(folder, tmp_path / "adapter"), ours, atol=1e-4 * np.abs(ours).max())


def test_modules_of_several_scales(base, rng, tmp_path):
    """They are written with one scale, the rest of it in B: PEFT computes the same."""
    folder = base("gemma3", 4)
    model = load_model(str(folder))
    paths = [
        layer.path for layer in layers_with_weights(model.backbone) if layer.name in ("query", "value", "ffw_linear")
    ]
    kinds = {path: LoraSpec("peft", 2 + number % 3, 1.5 + number) for number, path in enumerate(paths)}
    enable_on_layers(model.backbone, kinds, 0)
    randomize_b(model, rng)
    (tmp_path / "adapter").mkdir()
    write_peft_adapter(model, tmp_path / "adapter", str(folder))
    ours = our_logits(model)
    np.testing.assert_allclose(their_logits(folder, tmp_path / "adapter"), ours, atol=1e-4 * np.abs(ours).max())
