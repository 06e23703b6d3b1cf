"""How what was exported is read in each program, for model cards. Add a format's programs here."""

from typing import NamedTuple

from gemma_tune.data.chat_template import ChatTemplate


class Usage(NamedTuple):
    """One way to use a folder. language: Of the code, in which some words in capitals are replaced (`usage_of`)."""

    program: str
    language: str
    code: str


_KERAS = """\
import os
os.environ["KERAS_BACKEND"] = "jax"
import keras_hub

model = keras_hub.models.CausalLM.from_preset("FOLDER")
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
vllm serve FOLDER
curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{"model": "FOLDER", "messages": [{"role": "user", "content": "QUESTION"}]}'"""
_USAGES = {
    "keras": (Usage("KerasHub", "python", _KERAS), Usage("gemma_tune", "python", _GEMMA_TUNE)),
    "keras, quantized": (Usage("gemma_tune", "python", _GEMMA_TUNE),),
    "keras, with an adapter": (Usage("gemma_tune", "python", _WITH_ADAPTER),),
    "hf": (
        Usage("transformers", "python", _TRANSFORMERS),
        Usage("vLLM", "sh", _VLLM),
        Usage("gemma_tune", "python", _GEMMA_TUNE),
    ),
}


def usage_of(kind: str, folder: str, question: str, template: ChatTemplate) -> list[Usage]:
    """Returns the ways to use an export.

    Args:
        kind: A format, or one of the kinds of a format that `_USAGES` knows.
        folder: The export's name.
        question: To ask.
        template: Of the model's family.
    """
    words = {
        "FOLDER": folder,
        "QUESTION": " ".join(question.replace("\\", "").replace('"', "").replace("'", "").split()),
        "START_OF_TURN": template.start_of_turn,
        "END_OF_TURN": template.end_of_turn,
    }
    usages = []
    for usage in _USAGES[kind]:
        code = usage.code
        for word, value in words.items():
            code = code.replace(word, value)
        usages.append(usage._replace(code=code))
    return usages
