"""llama.cpp loads our GGUF files: `pip install -e '.[readers,demo]'`, then `pytest -m readers`.

How near its predictions are is decided by its arithmetic: GELU from a table in float16, products with float16 weights
that round their inputs to float16, and products with quantized weights that round theirs to 8 bits. Predictions are
compared as log-probabilities of the whole vocabulary: they are the logits less one number for each position.
"""

import gguf
import numpy as np
import pytest
from helpers.llama_cpp import LlamaCpp, ggml_quantize
from helpers.prompts import PROMPTS, TEXTS
from helpers.skips import needs, needs_demo

from gemma_tune.data import Turn, template_for
from gemma_tune.export.gguf.tensor_types import to_type
from gemma_tune.export.gguf.writer import write_gguf
from gemma_tune.models.load import load_model
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.serving.decode import decoder_of

pytestmark = [
    pytest.mark.readers,
    needs("xllamacpp", "readers"),
]
FAMILIES = ("gemma", "gemma2", "gemma3")
MAX_LENGTH, NEW_TOKENS = 64, 24
IDS = list(range(10, 60))


def logits(model, ids):
    """[L, V], from KerasHub's full call on rows of one length, so that little is compiled."""
    padded = np.zeros((1, MAX_LENGTH), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(model({"token_ids": padded, "padding_mask": np.ones_like(padded)}))[0, : len(ids)]


def log_probs(model, ids):
    values = logits(model, ids).astype(np.float64)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def their_log_probs(path, model):
    return LlamaCpp(path).next_log_probs(IDS, tokenizer_of(model).vocabulary_size)


def gelu_by_table(x, approximate=False):
    """ggml's GELU: of the input rounded to float16, itself rounded to it."""
    import jax

    table = jax.nn.gelu(x.astype("float16").astype("float32"), approximate=True)
    return table.astype("float16").astype("float32")


@pytest.fixture(scope="module", params=FAMILIES)
def random_model(request):
    """A tiny model of each family that GGUF has, as (its source, the model)."""
    source = f"tiny:{request.param}"
    return source, load_model(source)


def test_predictions_of_random_models(random_model, tmp_path, monkeypatch):
    """Windows, soft caps, both RoPE bases, all norms: 50 tokens, beyond a window of 16. With ggml's table for GELU in
    our model too, what is left is float32's rounding.
    """
    import keras

    source, model = random_model
    theirs = their_log_probs(write_gguf(model, tmp_path / "m.gguf", "f32"), model)
    plain = log_probs(model, IDS)
    np.testing.assert_allclose(theirs, plain, atol=5e-3)
    monkeypatch.setattr(keras.activations, "gelu", gelu_by_table)
    with_table = log_probs(load_model(source), IDS)
    # A sum that differs in its last bit may round to another float16.
    assert np.mean(np.abs(theirs - with_table)) < 0.2 * np.mean(np.abs(theirs - plain))


@pytest.mark.parametrize(
    ("scheme", "most"), [("f16", 0.01), ("bf16", 0.06), ("q8_0", 0.25), ("q4_k_m", 0.25), ("q4_0", 0.25)]
)
def test_predictions_of_random_models_in_fewer_bits(random_model, scheme, most, tmp_path):
    """Compared with our own model loaded from the same file, so that weights are the same."""
    path = write_gguf(random_model[1], tmp_path / "m.gguf", scheme)
    again = load_model(str(path))
    np.testing.assert_allclose(their_log_probs(path, again), log_probs(again, IDS), atol=most)


def test_the_chat_template_in_the_file(random_model, tmp_path):
    """llama.cpp's own Jinja renders conversations as we do."""
    source, model = random_model
    llama = LlamaCpp(write_gguf(model, tmp_path / "m.gguf", "q8_0"))
    template = template_for(source.removeprefix("tiny:"))
    for turns in (
        [("user", "Hi 'there'")],
        [("system", "Be {brief}."), ("user", " Hi\n"), ("model", 'Hello "you"'), ("user", "Bye")],
    ):
        messages = [{"role": role.replace("model", "assistant"), "content": content} for role, content in turns]
        wanted = template.render([Turn(*turn) for turn in turns], add_generation_prompt=True)
        assert llama.render(messages) in (wanted, wanted.removeprefix(template.bos))  # It adds <bos> as a token.


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "Q5_0", "Q4_0"])
def test_ggml_rounds_weights_no_better(rng, name):
    """Our search for scales against llama-quantize's own, on the same weights."""
    tensor_type = gguf.GGMLQuantizationType[name]
    values = np.ascontiguousarray(rng.standard_normal((64, 512)) * rng.exponential(size=(64, 1)), np.float32)
    ours, theirs = (
        np.linalg.norm(gguf.quants.dequantize(coded.reshape(64, -1), tensor_type) - values)
        for coded in (to_type(values, name, "w"), ggml_quantize(values, tensor_type))
    )
    assert 0 < ours <= 1.03 * theirs


@pytest.fixture(scope="module")
def written_demo(tmp_path_factory):
    """The real Gemma 3 270M, and its GGUF files by scheme."""
    model = load_model("demo")
    folder = tmp_path_factory.mktemp("gguf")
    return model, {scheme: write_gguf(model, folder / f"{scheme}.gguf", scheme) for scheme in ("f16", "q8_0", "q4_k_m")}


@needs_demo
@pytest.mark.demo
def test_tokens_of_the_real_model_are_the_same(written_demo):
    """But for U+2581 in a text: SentencePiece takes it for a space, and llama.cpp looks for spaces before that. And
    `<unk>`, which is text to SentencePiece and a token to llama.cpp: it reads what stands around it as we do.
    """
    model, paths = written_demo
    llama, tokenizer = LlamaCpp(paths["q8_0"]), tokenizer_of(model)
    unknown = llama.tokenize("<unk>")
    for text in TEXTS:
        first, *rest = [tokenizer.encode(part) for part in text.split("<unk>")]
        wanted = sum(([*unknown, *part] for part in rest), first)
        assert llama.tokenize(text) == wanted, text


@needs_demo
@pytest.mark.demo
def test_greedy_answers_of_the_real_model_in_float16(written_demo):
    """Token for token, or up to where our two best logits are nearer than the programs' arithmetic: 0.05 was the
    largest difference of any of the 262,144 logits in 78 positions.
    """
    model, paths = written_demo
    num_same, unlike = compare_answers(model, LlamaCpp(paths["f16"]), near=0.1)
    assert not unlike, unlike
    assert num_same >= 15


@needs_demo
@pytest.mark.demo
@pytest.mark.parametrize(("scheme", "near"), [("q8_0", 0.5), ("q4_k_m", 0.75)])
def test_greedy_answers_of_the_real_model_in_fewer_bits(written_demo, scheme, near):
    """Against our own model of the same file. llama.cpp rounds the inputs of products to 8 bits: 0.13 (q8_0) and 0.25
    (q4_k_m) is the mean difference of logits whose deviation is 5; near ties are as far as thrice that.
    """
    _, paths = written_demo
    _, unlike = compare_answers(load_model(str(paths[scheme])), LlamaCpp(paths[scheme]), near)
    assert not unlike, unlike


def compare_answers(model, llama, near):
    """Returns the number of 20 greedy answers that are the same, and those that differ first where it was no near tie."""
    tokenizer, num_same, unlike = tokenizer_of(model), 0, []
    for text in PROMPTS:
        prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
        ours = [token for (token,) in decoder_of(model).generate([prompt], NEW_TOKENS, (-1,))]
        theirs = llama.generate(prompt, NEW_TOKENS)
        place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            num_same += 1
            continue
        mine = logits(model, [*prompt, *theirs[:place]])[-1]
        margin = float(mine.max() - mine[theirs[place]])
        if margin > near:
            unlike.append((text, place, margin))
    return num_same, unlike
