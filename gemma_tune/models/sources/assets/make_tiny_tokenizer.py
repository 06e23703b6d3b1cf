"""Trains tiny.spm, the tokenizer of the tiny models, on the sample data set.

    python gemma_tune/models/sources/assets/make_tiny_tokenizer.py

It is a SentencePiece BPE model with Gemma's settings: pad, eos, bos, unk as ids 0 to 3; turn tokens, line feeds and
runs of spaces as whole pieces; byte fallback; no dummy prefix; white space is kept. It has the turn tokens of Gemma 1
to 3 and of Gemma 4, so that all tiny families share it.
"""

import io
import json
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
_NUM_ROWS = 330  # The first ones; those that came later left tiny.spm as it was.
SAMPLE = HERE.parents[2] / "data" / "samples" / "smartphone_support" / "train.jsonl"


def main() -> None:
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()[:_NUM_ROWS]]
    texts = [row["instruction"] for row in rows] + [row["response"] for row in rows]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=1024,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>", "\n", "\n\n", "▁▁", "▁▁▁▁"],
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    (HERE / "tiny.spm").write_bytes(model.getvalue())


if __name__ == "__main__":
    main()
