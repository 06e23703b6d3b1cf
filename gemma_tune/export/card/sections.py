"""The sections of a model card, from what is known of a model."""

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
# In result.json, as Hugging Face calls the metric, and as people do.
METRICS = (
    ("loss", "loss", "Loss"),
    ("perplexity", "perplexity", "Perplexity"),
    ("token_accuracy", "accuracy", "Token accuracy"),
)
_UNKNOWN = "Not known: what was exported says nothing of it."
_SETTINGS = ("method", "qat", "num_epochs", "num_train_steps", "batch_size", "grad_accum_steps")
_PACKAGES = ("gemma-tune", "keras-hub", "jax")
_ALWAYS_COUNTED = ("num_train", "num_heldout")
_QUESTION = "How do I reset my phone?"
_NUM_SAMPLES = 3


class About(NamedTuple):
    """What is to be said of an export.

    Attributes:
        name: Of its folder.
        kind, words: How it is used, as `usage_examples` takes them.
        library: The card's `library_name`.
        notes: Sentences.
        family, num_params: Of the model.
        languages, datasets: Of the data, where a user said them.
    """

    name: str
    kind: str
    library: str
    notes: list[str]
    family: str
    num_params: int
    words: Mapping[str, str] = types.MappingProxyType({})
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


def license_of(family: str, provenance: Provenance) -> str:
    """Returns Hugging Face's name of a model's terms. Gemma 4 is under Apache 2.0; tiny models are ours."""
    return "apache-2.0" if family == "gemma4" or provenance.is_tiny else "gemma"


def summary(about: About, provenance: Provenance) -> str:
    """Returns what it is, in a sentence or two."""
    what = _named_base(provenance)
    if provenance.config:
        what += f", fine-tuned with gemma_tune on `{Path(provenance.data_source).name}`"
    return "\n".join([f"{what}. {about.num_params:,} parameters, family {about.family}, text only.", *about.notes])


def use(about: About, provenance: Provenance) -> str:
    """Returns how to load it, program by program."""
    samples = provenance.result.get("samples") or []
    question = samples[0]["question"] if samples else _QUESTION
    usages = usage_examples(about.kind, about.name, question, template_for(about.family), about.words)
    return "\n\n".join(f"With {one.program}:\n\n```{one.language}\n{one.code}\n```" for one in usages)


def base(about: About, provenance: Provenance) -> str:
    """Returns the base model and its terms."""
    lines = [f"The base model is {_named_base(provenance)}." if provenance.base else f"The base model: {_UNKNOWN}"]
    if fingerprint := provenance.adapter.get("base_fingerprint"):
        lines.append(f"gemma_tune's fingerprint of its weights is `{fingerprint}`.")
    if provenance.is_tiny:
        lines.append("It has random weights, and is for trying things out.")
    elif license_of(about.family, provenance) == "gemma":
        lines += [
            f"{NOTICE_TEXT.strip()} ([terms]({TERMS})).",
            "They hold for this model too, and whoever passes it on passes them on, with the "
            "[prohibited uses](https://ai.google.dev/gemma/prohibited_use_policy).",
        ]
        if provenance.config:
            lines.append("The weights were modified by fine-tuning.")
    else:
        lines.append("It is under the Apache License 2.0.")
    return "\n".join(lines)


def data(provenance: Provenance) -> str:
    """Returns what it learnt from, counted and hashed."""
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
        rows.append(("hash of the data and of how it was cleaned and split", f"`{key}`"))
    rows += [(f"SHA-256 of `{name}`, at export", f"`{digest}`") for name, digest in provenance.data_files.items()]
    return _table(("data", ""), rows)


def training(provenance: Provenance) -> str:
    """Returns method and settings."""
    if not provenance.config:
        return _UNKNOWN
    config, chosen = Config.from_saved(provenance.config), provenance.config["training"]
    rows: list[tuple[str, Any]] = [(name, chosen[name]) for name in _SETTINGS if chosen[name]]
    if config.training.method != "full":
        rows += [
            (f"lora.{name}", value) for name, value in {**provenance.config["lora"], "alpha": config.lora_alpha}.items()
        ]
    if provenance.scheme:
        rows.append(("base held in", provenance.scheme))
    optimizer = {**provenance.config["optimizer"], "learning_rate": config.learning_rate}
    rows += [(f"optimizer.{name}", value) for name, value in optimizer.items()]
    rows += [("max_length", config.data.max_length), ("precision", config.model.precision), ("seed", config.seed)]
    if provenance.result:
        rows.append(("steps", provenance.result["best_step"]))
        rows.append(("trained parameters", f"{provenance.result['num_trainable_parameters']:,}"))
    rows += [(name, provenance.versions[name]) for name in _PACKAGES if name in provenance.versions]
    shown = [(name, ", ".join(value) if isinstance(value, (list, tuple)) else f"{value}") for name, value in rows]
    return "The loss is of the model's turns alone.\n\n" + _table(("setting", "value"), shown)


def results(provenance: Provenance) -> str:
    """Returns held-out values before and after, and some answers."""
    before, after = (provenance.result.get(f"heldout_{when}") or {} for when in ("before", "after"))
    if not after:
        return "Nothing was held out." if provenance.result else _UNKNOWN
    rows = [
        (title.lower(), f"{before[name]:.4f}" if name in before else "", f"{after[name]:.4f}")
        for name, _, title in METRICS
        if name in after
    ]
    parts = [_table(("held-out questions", "base model", "tuned model"), rows)]
    if count := provenance.result.get("num_answers_scored"):
        parts.append(f"{provenance.result['num_answers_right']} of {count} held-out questions got their own answer.")
    precision = provenance.config["model"]["precision"] + (
        f", on a base held in {provenance.scheme}" if provenance.scheme else ""
    )
    parts.append(f"Measured by gemma_tune at the end of training ({precision}), before the export.")
    samples = [
        (sample["question"], sample["reference"], sample["tuned_answer"])
        for sample in (provenance.result.get("samples") or [])[:_NUM_SAMPLES]
    ]
    return "\n\n".join([*parts, *([_table(("question", "wanted", "written"), samples)] if samples else [])])


def limits(provenance: Provenance) -> str:
    """Returns what it is for, and what not."""
    purpose = (
        "answers like those of its training data, to questions like those" if provenance.config else "writing text"
    )
    measured = "It was tuned and measured on these alone: on others it may do worse than its base. "
    return (
        f"Meant for {purpose}. {measured if provenance.config else ''}It can be wrong where it sounds sure. Nothing was "
        "done to make it safe beyond what its base is, whose limits and biases it has. Try it on your own questions "
        "before you rely on it, and leave no decision on people to it alone."
    )


def _named_base(provenance: Provenance) -> str:
    if provenance.hugging_face:
        return f"[{provenance.hugging_face}](https://huggingface.co/{provenance.hugging_face})"
    return f"`{Path(provenance.base).name}`" if provenance.base else "A Gemma"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Returns a text in one line that doesn't end a table's cell."""
    return " ".join(str(text).replace("\\", "\\\\").replace("|", "\\|").split())
