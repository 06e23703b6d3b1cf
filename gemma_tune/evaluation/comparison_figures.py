"""Holds the figures of a comparison of models on the same held-out data, and writes them for readers."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_TOKENS = 10_000  # Default number of scored tokens: the 99th percentile is then the highest of 100 of them.
NUM_ANSWERS = 3


class Quality(NamedTuple):
    """Quality of a model's predictions, as in `evaluate_batches`.

    Attributes:
        loss: Mean loss in nats per token.
        perplexity: exp(loss).
        token_accuracy: Share of target tokens that the model predicts as the likeliest.
    """

    loss: float
    perplexity: float
    token_accuracy: float


class Divergence(NamedTuple):
    """Divergence of a candidate's predictions from the reference's.

    Attributes:
        mean_kl, median_kl, p99_kl: Mean, median and 99th percentile of KL(reference || candidate) over the target
            positions, in nats.
        agreement: Share of positions with the same likeliest token.
        loss_increase: Mean loss of the candidate minus that of the reference; negative if the candidate is better.
        loss_increase_error: Standard error of loss_increase over the examples; None for a single example.
    """

    mean_kl: float
    median_kl: float
    p99_kl: float
    agreement: float
    loss_increase: float
    loss_increase_error: float | None


@dataclasses.dataclass
class ModelFigures:
    """Figures of one model in a comparison.

    Attributes:
        name: Name as it was given, such as `demo@nf4`.
        memory_bytes: Size of all arrays of the loaded model.
        disk_bytes: Size of its weight files; None for a model without files, such as `tiny`.
        has_files: False for a model that was quantized when it was loaded: disk_bytes is then the size of its arrays.
        quality: Quality of its predictions.
        divergence: Divergence from the reference; None for the reference itself.
        reading_tokens_per_second: Speed of the decoder blocks on packed held-out data.
        writing_tokens_per_second: Speed of decode steps, one answer at a time; None if no answer was long enough.
        answers: Answers to the report's questions.
    """

    name: str
    memory_bytes: int
    disk_bytes: int | None
    has_files: bool
    quality: Quality
    divergence: Divergence | None
    reading_tokens_per_second: float
    writing_tokens_per_second: float | None
    answers: list[str]


@dataclasses.dataclass
class FidelityReport:
    """Comparison of candidates with a reference on the same data.

    Attributes:
        data_source: Source of the data.
        num_examples, num_tokens: Numbers of scored examples, and of tokens in their answers.
        num_tokens_in_data: Number of tokens in all answers of the data.
        precision: Compute precision.
        device: Device that computed.
        questions, wanted_answers: Questions that the models answered, and the answers in the data.
        models: Figures of the reference, then those of the candidates.
    """

    data_source: str
    num_examples: int
    num_tokens: int
    num_tokens_in_data: int
    precision: str
    device: str
    questions: list[str]
    wanted_answers: list[str]
    models: list[ModelFigures]

    @property
    def reference(self) -> ModelFigures:
        """Figures of the reference."""
        return self.models[0]

    @property
    def candidates(self) -> list[ModelFigures]:
        """Figures of the candidates."""
        return self.models[1:]

    @property
    def scope(self) -> str:
        """Text that says which data was scored."""
        limit = "" if self.num_tokens == self.num_tokens_in_data else f" of {self.num_tokens_in_data:,}"
        return f"{self.num_tokens:,}{limit} answer tokens in {self.num_examples:,} examples of {self.data_source}"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for `comparison.json` and `--json`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "models": [_plain(model) for model in self.models]}


def figure_rows(report: FidelityReport) -> list[tuple[str, list[str]]]:
    """Returns the rows of the table for readers, without empty ones: a label, and a text for each model."""
    labels: list[tuple[str, Callable[[ModelFigures], str]]] = [
        ("memory", lambda model: size_text(model.memory_bytes)),
        ("share of the reference's", lambda model: f"{100 * model.memory_bytes / report.reference.memory_bytes:.0f} %"),
        ("disk", _disk_text),
        ("KL, mean", lambda model: _of(model.divergence, lambda d: kl_text(d.mean_kl))),
        ("KL, median", lambda model: _of(model.divergence, lambda d: kl_text(d.median_kl))),
        ("KL, 99th percentile", lambda model: _of(model.divergence, lambda d: kl_text(d.p99_kl))),
        ("same likeliest token", lambda model: _of(model.divergence, lambda d: share_text(d.agreement))),
        ("loss", lambda model: f"{model.quality.loss:.4f}"),
        ("loss increase", lambda model: _of(model.divergence, lambda d: f"{d.loss_increase:+.4f}")),
        ("  ± standard error", lambda model: _of(model.divergence, _error_text)),
        ("perplexity", lambda model: f"{model.quality.perplexity:,.2f}"),
        ("token accuracy", lambda model: share_text(model.quality.token_accuracy)),
        ("reading, tokens/s", lambda model: f"{model.reading_tokens_per_second:,.0f}"),
        ("writing, tokens/s", lambda model: _of(model.writing_tokens_per_second, lambda rate: f"{rate:,.1f}")),
    ]
    rows = [(label, [text_of(model) for model in report.models]) for label, text_of in labels]
    return [(label, texts) for label, texts in rows if set(texts) != {_NOTHING}]


def notes(report: FidelityReport) -> list[str]:
    """Returns notes that explain the table."""
    lines = [
        f"KL: divergence of the next token's distribution from that of {report.reference.name}, in nats. Loss: in nats "
        "per token. Both are computed over the tokens of the answers.",
        f"Reading (without the LM head) and writing (one answer at a time) on {report.device} in {report.precision}.",
    ]
    if any(model.divergence and model.divergence.loss_increase_error is not None for model in report.models):
        lines.append("Standard error: over examples, since the tokens of an answer are correlated.")
    if not all(model.has_files for model in report.models):
        lines.append("*: size of the arrays; the model was quantized when it was loaded and has no such file.")
    return lines


def summaries(report: FidelityReport) -> list[str]:
    """Returns a sentence for each candidate about its memory and its divergence."""
    sentences = []
    for model in report.candidates:
        assert model.divergence  # Only the reference has none.
        share = 100 * model.memory_bytes / report.reference.memory_bytes
        sentences.append(
            f"{model.name} takes {size_text(model.memory_bytes)}, {share:.0f} % of {report.reference.name}'s memory, "
            f"and predicts the same likeliest token at {share_text(model.divergence.agreement)} of the positions; loss "
            f"{_increase_text(model.divergence)}."
        )
    return sentences


def size_text(num_bytes: float) -> str:
    """Returns a size with three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.{max(0, 3 - len(str(int(num_bytes))))}f} {unit}" if unit != "B" else f"{num_bytes} B"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def short_name(name: str) -> str:
    """Returns a model's name for charts and columns, with only the end of a long path."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def kl_text(kl: float) -> str:
    """Returns a KL divergence with three digits."""
    return f"{kl:.3g}" if kl >= 1e-4 or not kl else f"{kl:.1e}"


def share_text(share: float) -> str:
    """Returns a share as a percentage, which is 100 % only for all."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9):.1f} %"


_NOTHING = "–"
_LONGEST_NAME = 20


def _of(value: Any, text_of: Callable[[Any], str]) -> str:
    return _NOTHING if value is None else text_of(value)


def _increase_text(values: Divergence) -> str:
    text = f"{values.loss_increase:+.4f}"
    return text if values.loss_increase_error is None else f"{text} ± {values.loss_increase_error:.4f}"


def _error_text(values: Divergence) -> str:
    return _of(values.loss_increase_error, lambda error: f"{error:.4f}")


def _disk_text(model: ModelFigures) -> str:
    return _NOTHING if model.disk_bytes is None else size_text(model.disk_bytes) + ("" if model.has_files else "*")


def _plain(model: ModelFigures) -> dict[str, Any]:
    divergence = model.divergence._asdict() if model.divergence else None
    return {**dataclasses.asdict(model), "quality": model.quality._asdict(), "divergence": divergence}
