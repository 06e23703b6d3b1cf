"""Tokenizes training and held-out examples and stores the tokens on disk, where a second run finds them."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.data.chat_template import ChatTemplate
from gemma_tune.data.chunks import garbage_collector_paused
from gemma_tune.data.cleaning_report import DataReport
from gemma_tune.data.example import Tokenizer
from gemma_tune.data.mixture import source_labels
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
        train_sources: [n] uint16 number, in `report.sources`, of the source of each training example.
        heldout_sources: The same of each held-out example.
        report: Numbers of rows read, dropped and shortened.
    """

    train: TokenStore
    heldout: TokenStore
    train_examples: ExampleStore
    heldout_examples: ExampleStore
    train_sources: np.ndarray
    heldout_sources: np.ndarray
    report: DataReport

    @property
    def source_labels(self) -> list[str]:
        """Short names of the sources, of letters that trackers allow."""
        return source_labels([source["name"] for source in self.report.sources])


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
        report = copy.deepcopy(splits.report)
        num_examples = len(splits.train) + len(splits.heldout)
        with progress.track_progress("tokenized examples", num_examples) as advance, garbage_collector_paused():

            def write(name: str, examples: ExampleStore, sources: np.ndarray) -> np.ndarray:
                kept = [np.empty(0, np.int64)]
                with TokenWriter(folder, name) as writer, open(folder / _LENGTHS, "ab") as lengths:
                    for chunk in tokenize_chunks(examples, template, tokenizer, max_length, overlong):
                        writer.append(chunk.token_ids, chunk.is_target, chunk.num_tokens, chunk.num_targets)
                        lengths.write(chunk.lengths.astype(np.int32).data)
                        kept.append(chunk.kept)
                        report.count_tokenized(chunk, examples, sources, name)
                        advance(len(chunk.lengths))
                return np.concatenate(kept)

            train = write("train", splits.train, splits.train_sources)
            heldout = write("heldout", splits.heldout, splits.heldout_sources)
        report.num_train, report.num_heldout = len(train), len(heldout)
        write_array(folder / _KEPT_TRAIN, train)
        write_array(folder / _KEPT_HELDOUT, heldout)
        if not report.num_train:
            _refuse_to_learn_nothing(len(splits.train), read_array(folder / _LENGTHS, np.int32), max_length, report)
        return report.counts()

    entry = cached(cache and cache / "tokens", key, build)
    train, heldout = (read_array(entry.folder / name, np.int64) for name in (_KEPT_TRAIN, _KEPT_HELDOUT))
    return TokenizedSplits(
        train=TokenStore.open(entry.folder, "train", entry.owner),
        heldout=TokenStore.open(entry.folder, "heldout", entry.owner),
        train_examples=splits.train.select(train),
        heldout_examples=splits.heldout.select(heldout),
        train_sources=splits.train_sources[train],
        heldout_sources=splits.heldout_sources[heldout],
        report=DataReport(**entry.values, lengths=read_array(entry.folder / _LENGTHS, np.int32)),
    )


def _refuse_to_learn_nothing(num_train: int, lengths: np.ndarray, max_length: int, report: DataReport) -> None:
    why = (
        "data.overlong=drop leaves them out"
        if report.num_overlong_dropped
        else "their questions leave no room for answers"
    )
    raise DataError(
        f"All {num_train} training examples are too long for data.max_length={max_length}: {why}, so there is "
        f"nothing to learn. Examples have {lengths.min()} to {lengths.max()} tokens. --max_length={lengths.max() - 1} "
        "holds all of them whole."
    )
