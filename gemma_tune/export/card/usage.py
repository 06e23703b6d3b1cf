"""Writes the code that loads an export in each program, for model cards. A format's programs are listed here."""

import json
import shlex
from collections.abc import Mapping
from typing import NamedTuple

from gemma_tune.data.chat_template import ChatTemplate

_HARMLESS = str.maketrans({"\\": "", "`": "", '"': "”", "'": "’"})  # These end strings in Python, shells, Markdown.


class UsageExample(NamedTuple):
    """Code that uses an export.

    Attributes:
        program: Program or library that reads the export.
        language: Language of the code: `python` or `sh`.
        code: Source text, in which placeholders are words in capitals.
    """

    program: str
    language: str
    code: str


_KERAS = """\
import os
os.environ["KERAS_BACKEND"] = "jax"
import keras_hub

model = keras_hub.models.CAUSAL_LM.from_preset("FOLDER")
prompt = "START_OF_TURNuser\\nQUESTIONEND_OF_TURN\\nSTART_OF_TURNmodel\\n"
stop = model.preprocessor.tokenizer.token_to_id("END_OF_TURN")
print(model.generate(prompt, max_length=256, stop_token_ids=(stop,)))"""
_GEMMA_TUNE = """\
import gemma_tune

model = gemma_tune.load_model("FOLDER")
print(gemma_tune.generate(model, "QUESTION"))"""
_WITH_ADAPTER = _GEMMA_TUNE.replace('("FOLDER")', '("FOLDER", adapter="FOLDER/adapter")')
_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
messages = [{"role": "user", "content": "QUESTION"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=128, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
_VLLM = """\
vllm serve FOLDER --served-model-name=mine
curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{"model": "mine", "messages": [{"role": "user", "content": "QUESTION"}]}'"""
_PEFT = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("BASE")
inputs = tokenizer("START_OF_TURNuser\\nQUESTIONEND_OF_TURN\\nSTART_OF_TURNmodel\\n", return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=128, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
_VLLM_LORA = "vllm serve BASE --enable-lora --max-lora-rank=MAX_RANK --lora-modules mine=FOLDER"
_ON_BASE = _GEMMA_TUNE.replace('("FOLDER")', '("NAMED", adapter="FOLDER")')
_LLAMA_CPP = "llama-cli -m FOLDER/FILE -p 'QUESTION'"
_OLLAMA = """\
cd FOLDER
ollama create mine -f Modelfile
ollama run mine 'QUESTION'"""
_LITERT = """\
import json
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from sentencepiece import SentencePieceProcessor

settings = json.load(open("FOLDER/litert.json"))
tokenizer = SentencePieceProcessor(model_file="FOLDER/tokenizer.model")
decode = Interpreter("FOLDER/model.tflite").get_signature_runner("decode")
cache = {
    name: np.zeros(one["shape"], np.float32)
    for name, one in decode.get_input_details().items() if name.startswith("kv_cache")
}
prompt = "START_OF_TURNuser\\nQUESTIONEND_OF_TURN\\nSTART_OF_TURNmodel\\n"
ids, answer = [settings["bos_id"], *tokenizer.encode(prompt)], []
for position in range(settings["cache_length"]):
    token = (ids + answer)[position]
    cache = decode(tokens=np.array([[token]], np.int32), input_pos=np.array([position], np.int32), **cache)
    following = int(cache.pop("logits").argmax())
    if position >= len(ids) - 1:
        if following in settings["stop_ids"]:
            break
        answer.append(following)
print(tokenizer.decode(answer))"""
_EXAMPLES = {
    "keras": (UsageExample("KerasHub", "python", _KERAS), UsageExample("gemma_tune", "python", _GEMMA_TUNE)),
    "keras, quantized": (UsageExample("gemma_tune", "python", _GEMMA_TUNE),),
    "keras, with an adapter": (UsageExample("gemma_tune", "python", _WITH_ADAPTER),),
    "hf": (
        UsageExample("transformers", "python", _TRANSFORMERS),
        UsageExample("vLLM", "sh", _VLLM),
        UsageExample("gemma_tune", "python", _GEMMA_TUNE),
    ),
    "peft": (
        UsageExample("PEFT", "python", _PEFT),
        UsageExample("vLLM", "sh", _VLLM_LORA),
        UsageExample("gemma_tune", "python", _ON_BASE),
    ),
    "peft, not for vLLM": (
        UsageExample("PEFT", "python", _PEFT),
        UsageExample("gemma_tune", "python", _ON_BASE),
    ),
    "gguf": (
        UsageExample("llama.cpp", "sh", _LLAMA_CPP),
        UsageExample("Ollama", "sh", _OLLAMA),
        UsageExample("gemma_tune", "python", _GEMMA_TUNE.replace("FOLDER", "FOLDER/FILE")),
    ),
    "litert": (UsageExample("LiteRT", "python", _LITERT),),
}

_NEXT = {
    "keras": "gemma-tune chat --model=FOLDER",
    "keras, quantized": "gemma-tune chat --model=FOLDER",
    "keras, with an adapter": "gemma-tune chat --model=FOLDER --adapter=FOLDER/adapter",
    "hf": "gemma-tune chat --model=FOLDER",
    "peft": "gemma-tune chat --model=NAMED --adapter=FOLDER",
    "peft, not for vLLM": "gemma-tune chat --model=NAMED --adapter=FOLDER",
    "gguf": "gemma-tune chat --model=FOLDER/FILE",
    "litert": "less FOLDER/README.md",
}


def next_command(usage: str, folder: str, placeholders: Mapping[str, str]) -> str:
    """Returns a command to try an export with, quoted for the shell. Arguments as in `usage_examples`."""
    return _filled(_NEXT[usage], "sh", {**placeholders, "FOLDER": folder})


def usage_examples(
    usage: str, folder: str, question: str, template: ChatTemplate, placeholders: Mapping[str, str]
) -> list[UsageExample]:
    """Returns the code that uses an export, for each program that reads it.

    Args:
        usage: Name of a format, or of one of its variants in `_EXAMPLES`.
        folder: Name of the export's folder.
        question: Question that the code asks.
        template: Chat template of the model's family.
        placeholders: Further placeholders of the format, and their values.
    """
    names = {**placeholders, "FOLDER": folder}
    texts = {
        "START_OF_TURN": template.start_of_turn,
        "END_OF_TURN": template.end_of_turn,
        "QUESTION": " ".join(question.translate(_HARMLESS).split()),
    }
    return [
        example._replace(code=_replaced(_filled(example.code, example.language, names), texts))
        for example in _EXAMPLES[usage]
    ]


def _filled(code: str, language: str, names: Mapping[str, str]) -> str:
    """Returns code with names of files and models, written as the language requires."""
    quote = shlex.quote if language == "sh" else lambda name: json.dumps(name, ensure_ascii=False)[1:-1]
    return _replaced(code, {placeholder: quote(name) for placeholder, name in names.items()})


def _replaced(text: str, values: Mapping[str, str]) -> str:
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return text
