"""Steps 2 and 3, collect and preprocess: pure functions that turn files into packed batches, without Keras."""

from gemma_tune.data.chat_template import ChatTemplate, template_for
from gemma_tune.data.cleaning_report import DataReport
from gemma_tune.data.example import Batch, Example, TokenizedExample, Tokenizer, Turn
from gemma_tune.data.packing import EpochPlan, Rows, make_batch, num_positions, plan_rows
from gemma_tune.data.splits import Splits, load_examples, load_splits
from gemma_tune.data.storage.token_store import TokenStore
from gemma_tune.data.tokenized_splits import TokenizedSplits, tokenize_splits

__all__ = [
    "Batch",
    "ChatTemplate",
    "DataReport",
    "EpochPlan",
    "Example",
    "Rows",
    "Splits",
    "TokenStore",
    "TokenizedExample",
    "TokenizedSplits",
    "Tokenizer",
    "Turn",
    "load_examples",
    "load_splits",
    "make_batch",
    "num_positions",
    "plan_rows",
    "template_for",
    "tokenize_splits",
]
