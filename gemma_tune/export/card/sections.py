"""Writes the sections of a model card from what is known about a model."""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.config import Config
from gemma_tune.data.chat_template import template_for
from gemma_tune.export.card.provenance import Provenance
from gemma_tune.export.card.usage import usage_examples

TERMS = "https://ai.google.dev/gemma/terms"
NOTICE_TEXT = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
# Name in result.json, Hugging Face's name of the metric, and title for readers.
METRICS = (
    ("loss", "loss", "Loss"),
    ("perplexity", "perplexity", "Perplexity"),
    ("token_accuracy", "accuracy", "Token accuracy"),
)
_UNKNOWN = "Not known: the files of the exported model don't say."
_SETTINGS = ("method", "qat", "num_epochs", "num_train_steps", "batch_size", "grad_accum_steps")
_PACKAGES = ("gemma-tune", "keras-hub", "jax")
_ALWAYS_COUNTED = ("num_train", "num_heldout")
_QUESTION = "How do I reset my phone?"
_NUM_SAMPLES = 3


class About(NamedTuple):
    """Facts about an export for its model card.

    Attributes:
        name: Name of its folder.
        usage, placeholders: Key and placeholders of its usage examples, as for `usage_examples`.
        library: `library_name` in the card's metadata.
        notes: Sentences about the export.
        family: Family of the model.
        num_params: Number of parameters of the model.
        languages, datasets: Languages and names of the data, if the user gave them.
    """

    name: str
    usage: str
    library: str
    notes: list[str]
    family: str
    num_params: int
    placeholders: Mapping[str, str] = types.MappingProxyType({})
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


def license_of(family: str, provenance: Provenance) -> str:
    """Returns Hugging Face's name of a model's license: Gemma 4 and tiny models are under Apache 2.0."""
    return "apache-2.0" if family == "gemma4" or provenance.is_tiny else "gemma"


def summary(about: About, provenance: Provenance) -> str:
    """Returns a summary of the model in a sentence or two, followed by the notes."""
    what = _named_base(provenance)
    if provenance.config:
        what += f", fine-tuned with gemma_tune on `{Path(provenance.data_source).name}`"
    return "\n".join([f"{what}. {about.num_params:,} parameters, family {about.family}, text only.", *about.notes])


def use(about: About, provenance: Provenance) -> str:
    """Returns the code that loads the model, program by program."""
    samples = provenance.result.get("samples") or []
    question = samples[0]["question"] if samples else _QUESTION
    examples = usage_examples(about.usage, about.name, question, template_for(about.family), about.placeholders)
    return "\n\n".join(f"With {one.program}:\n\n```{one.language}\n{one.code}\n```" for one in examples)


def base(about: About, provenance: Provenance) -> str:
    """Returns the name of the base model, and its license terms."""
    lines = [f"The base model is {_named_base(provenance)}." if provenance.base else "The base model is not known."]
    if fingerprint := provenance.adapter.get("base_fingerprint"):
        lines.append(f"The fingerprint of its weights in gemma_tune is `{fingerprint}`.")
    if provenance.is_tiny:
        lines.append("It has random weights, and is only for trying things out.")
    elif license_of(about.family, provenance) == "gemma":
        lines += [
            f"{NOTICE_TEXT.strip()} ([terms]({TERMS})).",
            "These terms and the [prohibited use policy](https://ai.google.dev/gemma/prohibited_use_policy) apply to "
            "this model too, and must be passed on with it.",
        ]
        if provenance.config:
            lines.append("The weights were modified by fine-tuning.")
    else:
        lines.append("It is under the Apache License 2.0.")
    return "\n".join(lines)


def data(provenance: Provenance) -> str:
    """Returns a table of the training data: source, counts and hashes."""
    if not provenance.config:
        return _UNKNOWN
    counts = provenance.result.get("data") or {}
    rows = [("source", f"`{provenance.data_source}`")]
    rows += [
        (name.removeprefix("num_").replace("_", " "), f"{count:,}")
        for name, count in counts.items()
        if name.startswith("num_") and (count or name in _ALWAYS_COUNTED)
    ]
    if lengths := counts.get("length_tokens"):
        rows.append(("length in tokens", ", ".join(f"{name} {value:g}" for name, value in lengths.items())))
    if key := provenance.versions.get("data"):
        rows.append(("hash of the data and its preprocessing", f"`{key}`"))
    rows += [(f"SHA-256 of `{name}` at export", f"`{digest}`") for name, digest in provenance.data_files.items()]
    return _table(("data", ""), rows)


def training(provenance: Provenance) -> str:
    """Returns a table of the training method and settings."""
    if not provenance.config:
        return _UNKNOWN
    config, chosen = Config.from_saved(provenance.config), provenance.config["training"]
    rows: list[tuple[str, Any]] = [(name, chosen[name]) for name in _SETTINGS if chosen[name]]
    if config.training.method != "full":
        rows += [
            (f"lora.{name}", value) for name, value in {**provenance.config["lora"], "alpha": config.lora_alpha}.items()
        ]
    if provenance.scheme:
        rows.append(("quantization of the base", provenance.scheme))
    optimizer = {**provenance.config["optimizer"], "learning_rate": config.learning_rate}
    rows += [(f"optimizer.{name}", value) for name, value in optimizer.items()]
    rows += [("max_length", config.data.max_length), ("precision", config.model.precision), ("seed", config.seed)]
    if provenance.result:
        rows.append(("steps", provenance.result["best_step"]))
        rows.append(("trained parameters", f"{provenance.result['num_trainable_parameters']:,}"))
    rows += [(name, provenance.versions[name]) for name in _PACKAGES if name in provenance.versions]
    shown = [(name, ", ".join(value) if isinstance(value, (list, tuple)) else f"{value}") for name, value in rows]
    return "The loss counts the tokens of the model's turns only.\n\n" + _table(("setting", "value"), shown)


def results(provenance: Provenance) -> str:
    """Returns the held-out metrics before and after training, and some answers."""
    before, after = (provenance.result.get(f"heldout_{when}") or {} for when in ("before", "after"))
    if not after:
        return "No data was held out." if provenance.result else _UNKNOWN
    rows = [
        (title.lower(), f"{before[name]:.4f}" if name in before else "", f"{after[name]:.4f}")
        for name, _, title in METRICS
        if name in after
    ]
    parts = [_table(("held-out questions", "base model", "tuned model"), rows)]
    if count := provenance.result.get("num_answers_scored"):
        parts.append(
            f"{provenance.result['num_answers_right']} of {count} held-out questions got an answer whose words are "
            "closer to the wanted answer than to that of any other question."
        )
    precision = provenance.config["model"]["precision"] + (
        f", on a base in {provenance.scheme}" if provenance.scheme else ""
    )
    parts.append(f"Measured by gemma_tune after training ({precision}), before the export.")
    samples = [
        (sample["question"], sample["reference"], sample["tuned_answer"])
        for sample in (provenance.result.get("samples") or [])[:_NUM_SAMPLES]
    ]
    if samples:
        parts.append(_table(("question", "wanted answer", "answer of this model"), samples))
    return "\n\n".join(parts)


def limits(provenance: Provenance) -> str:
    """Returns the intended use and the limits of the model."""
    if provenance.config:
        purpose = "It is meant for questions like those of its training data, which it should answer in the same way."
        measured = " It was trained and measured on such questions only: on others it may do worse than its base model."
    else:
        purpose, measured = "It is meant for generating text.", ""
    return (
        f"{purpose}{measured} It can be wrong even where it sounds certain. Nothing was done to make it safer than its "
        "base model, whose limits and biases it shares. Try it on your own questions before you rely on it, and leave "
        "no decision about people to it alone."
    )


def _named_base(provenance: Provenance) -> str:
    if provenance.hugging_face:
        return f"[{provenance.hugging_face}](https://huggingface.co/{provenance.hugging_face})"
    return f"`{Path(provenance.base).name}`" if provenance.base else "A Gemma model"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Returns a text on one line, escaped for a cell of a table."""
    return " ".join(str(text).replace("\\", "\\\\").replace("|", "\\|").split())
