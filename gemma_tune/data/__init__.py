"""Steps 2 and 3: collect and preprocess. Pure functions from files to packed batches; imports no Keras."""

from gemma_tune.data.chat_template import ChatTemplate, template_for
from gemma_tune.data.example import Batch, Example, TokenizedExample, Tokenizer, Turn
from gemma_tune.data.packing import EpochPlan, Rows, make_batch, num_positions, plan_rows
from gemma_tune.data.prepare import PreparedData, tokenize_splits
from gemma_tune.data.report import DataReport
from gemma_tune.data.splits import Splits, load_examples, load_splits
from gemma_tune.data.token_store import TokenStore

__all__ = [
    "Batch",
    "ChatTemplate",
    "DataReport",
    "EpochPlan",
    "Example",
    "PreparedData",
    "Rows",
    "Splits",
    "TokenStore",
    "TokenizedExample",
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
