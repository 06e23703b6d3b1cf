"""Tokenizes training and held-out examples and stores the tokens on disk, where a second run finds them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.data.chat_template import ChatTemplate
from gemma_tune.data.chunks import garbage_collector_paused
from gemma_tune.data.cleaning_report import DataReport
from gemma_tune.data.example import Tokenizer
from gemma_tune.data.sources.content_hash import tokenizer_fingerprint
from gemma_tune.data.splits import Splits
from gemma_tune.data.storage.array_files import read_array, write_array
from gemma_tune.data.storage.cache import cache_key, cached
from gemma_tune.data.storage.example_store import ExampleStore
from gemma_tune.data.storage.token_store import TokenStore, TokenWriter
from gemma_tune.data.tokenize import tokenize_chunks
from gemma_tune.errors import DataError
from gemma_tune.runtime import progress

_KEPT_TRAIN, _KEPT_HELDOUT, _LENGTHS = "train.kept", "heldout.kept", "lengths"


@dataclasses.dataclass
class TokenizedSplits:
    """Tokenized examples, on disk.

    Attributes:
        train: Tokens of the training examples.
        heldout: Tokens of the held-out examples.
        train_examples: Conversations of the training examples, in the order of their tokens.
        heldout_examples: Conversations of the held-out examples, in the order of their tokens.
        report: Numbers of rows read, dropped and shortened.
    """

    train: TokenStore
    heldout: TokenStore
    train_examples: ExampleStore
    heldout_examples: ExampleStore
    report: DataReport


def tokenize_splits(
    splits: Splits,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    max_length: int,
    overlong: str,
    cache: Path | None = None,
) -> TokenizedSplits:
    """Tokenizes both splits, or finds the result of an earlier run.

    Args:
        splits: Cleaned examples.
        template, tokenizer, max_length, overlong: Arguments as in `tokenize_chunks`.
        cache: Folder of the cache; None: a temporary folder.

    Raises:
        DataError: No training example has anything left to learn, or one is too long and `overlong` is `error`.
    """
    key = cache_key(
        {
            "splits": splits.key,
            "template": dataclasses.asdict(template),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "max_length": max_length,
            "overlong": overlong,
        }
    )

    def build(folder: Path) -> dict[str, Any]:
        report = dataclasses.replace(splits.report)
        num_examples = len(splits.train) + len(splits.heldout)
        with progress.track_progress("tokenized examples", num_examples) as advance, garbage_collector_paused():

            def write(name: str, examples: ExampleStore) -> np.ndarray:
                kept = [np.empty(0, np.int64)]
                with TokenWriter(folder, name) as writer, open(folder / _LENGTHS, "ab") as lengths:
                    for chunk in tokenize_chunks(examples, template, tokenizer, max_length, overlong):
                        writer.append(chunk.token_ids, chunk.is_target, chunk.num_tokens, chunk.num_targets)
                        lengths.write(chunk.lengths.astype(np.int32).data)
                        kept.append(chunk.kept)
                        report.count_tokenized(chunk)
                        advance(len(chunk.lengths))
                return np.concatenate(kept)

            train, heldout = write("train", splits.train), write("heldout", splits.heldout)
        report.num_train, report.num_heldout = len(train), len(heldout)
        write_array(folder / _KEPT_TRAIN, train)
        write_array(folder / _KEPT_HELDOUT, heldout)
        if not report.num_train:
            _refuse_to_learn_nothing(read_array(folder / _LENGTHS, np.int32)[: len(splits.train)], max_length)
        return report.counts()

    entry = cached(cache and cache / "tokens", key, build)
    return TokenizedSplits(
        train=TokenStore.open(entry.folder, "train", entry.owner),
        heldout=TokenStore.open(entry.folder, "heldout", entry.owner),
        train_examples=splits.train.select(read_array(entry.folder / _KEPT_TRAIN, np.int64)),
        heldout_examples=splits.heldout.select(read_array(entry.folder / _KEPT_HELDOUT, np.int64)),
        report=DataReport(**entry.values, lengths=read_array(entry.folder / _LENGTHS, np.int32)),
    )


def _refuse_to_learn_nothing(lengths: np.ndarray, max_length: int) -> None:
    raise DataError(
        f"All {len(lengths)} training examples are too long for data.max_length={max_length}: their questions leave no "
        f"room for answers, so there is nothing to learn. The shortest has {lengths.min()} tokens. Raise "
        "data.max_length."
    )
