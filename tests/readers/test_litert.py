"""LiteRT runs our .tflite files: `pip install -e '.[readers,demo]'`, then `pytest -m readers`."""

import json

import numpy as np
import pytest
from helpers.skips import needs, needs_demo

from gemma_tune.export.litert.model import Lengths, write_litert
from gemma_tune.models.load import load_model
from gemma_tune.models.sources.tokenizer import TextTokenizer, tokenizer_of
from gemma_tune.serving.decode import decoder_of

pytestmark = [
    pytest.mark.readers,
    needs("ai_edge_litert", "readers"),
]
PROMPT, NEW_TOKENS = list(range(10, 30)), 16


def answer(folder, prompt, count):
    """The loop that a phone runs: (tokens, logits [count, V])."""
    from ai_edge_litert.interpreter import Interpreter

    length = json.loads((folder / "litert.json").read_text())["prefill_length"]
    interpreter = Interpreter(model_path=str(folder / "model.tflite"), num_threads=2)
    prefill, decode = (interpreter.get_signature_runner(name) for name in (f"prefill_{length}", "decode"))
    details = {name: one for name, one in decode.get_input_details().items() if name.startswith("kv_cache")}
    cache = {name: np.zeros(one["shape"], one["dtype"]) for name, one in details.items()}
    for start in range(0, len(prompt) - 1, length):
        tokens = np.zeros((1, length), np.int32)
        part = prompt[start : min(start + length, len(prompt) - 1)]
        tokens[0, : len(part)] = part
        cache = prefill(tokens=tokens, input_pos=np.arange(start, start + length, dtype=np.int32), **cache)
    token, made, logits = prompt[-1], [], []
    for position in range(len(prompt) - 1, len(prompt) - 1 + count):
        cache = decode(tokens=np.array([[token]], np.int32), input_pos=np.array([position], np.int32), **cache)
        logits.append(cache.pop("logits")[0, 0])
        token = int(logits[-1].argmax())
        made.append(token)
    return made, np.stack(logits)


def ours(model, prompt, count):
    return [token for (token,) in decoder_of(model).generate([prompt], count, (-1,))]


def full_logits(model, ids):
    row = np.asarray(ids)[None]
    inputs = {"token_ids": row, "padding_mask": np.ones_like(row)}
    if "position_ids" in model.backbone.input:
        inputs["position_ids"] = np.arange(len(ids))[None]
    return np.asarray(model(inputs))[0]


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "gemma4"])
def test_it_answers_as_we_do(tiny, family, tmp_path):
    """The prompt goes in in three parts, the last one filled up; the window of 16 is left behind."""
    model = tiny(family)
    write_litert(model, tmp_path, lengths=Lengths(8, 64))
    made, logits = answer(tmp_path, PROMPT, NEW_TOKENS)
    assert made == ours(model, PROMPT, NEW_TOKENS)
    wanted = full_logits(model, PROMPT + made[:-1])[len(PROMPT) - 1 :]
    np.testing.assert_allclose(logits, wanted, atol=1e-4)  # float32, in another order.
    proto = (tmp_path / "tokenizer.model").read_bytes()
    assert TextTokenizer(proto).encode("How  do\n") == tokenizer_of(model).encode("How  do\n")


def test_int8_is_smaller_and_near(tiny, tmp_path):
    model = tiny("gemma3")
    (tmp_path / "float").mkdir()
    whole = write_litert(model, tmp_path / "float", lengths=Lengths(8, 64)).stat().st_size
    small = write_litert(model, tmp_path, lengths=Lengths(8, 64), weight_format="int8").stat().st_size
    assert small < whole
    _, logits = answer(tmp_path, PROMPT, 1)
    wanted = full_logits(model, PROMPT)[-1]
    assert np.corrcoef(logits[0], wanted)[0, 1] > 0.99


@pytest.mark.demo
@needs_demo
def test_the_demo_model(tmp_path):
    model = load_model("demo")
    write_litert(model, tmp_path, lengths=Lengths(16, 128))
    tokenizer = tokenizer_of(model)
    for text in ("Water boils at", "The three primary colours are"):
        prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
        made, logits = answer(tmp_path, prompt, 12)
        assert made == ours(model, prompt, 12)
        wanted = full_logits(model, prompt)[-1]
        np.testing.assert_allclose(logits[0], wanted, atol=5e-3)  # Logits of 20, sums over 2048.
