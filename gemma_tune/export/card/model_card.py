"""Writes model cards (arXiv:1810.03993) in Hugging Face's format: README.md, with metadata before the text."""

import re
from pathlib import Path
from typing import Any

from gemma_tune.data.sources.tfds import TFDS
from gemma_tune.errors import ConfigError
from gemma_tune.export.card import sections
from gemma_tune.export.card.provenance import Provenance
from gemma_tune.export.card.sections import About
from gemma_tune.runtime.atomic_files import write_text

CARD, NOTICE = "README.md", "NOTICE"
_LANGUAGE = r"[a-z]{2,3}|code|multilingual"
_DATASET = r"[\w.-]+/[\w.-]+|[\w.-]+"


def write_card(folder: Path, about: About, provenance: Provenance) -> None:
    """Writes README.md and, for a model under Google's Gemma terms, the NOTICE that they require."""
    write_text(folder / CARD, model_card(about, provenance))
    if sections.license_of(about.family, provenance) == "gemma":
        write_text(folder / NOTICE, sections.NOTICE_TEXT)


def model_card(about: About, provenance: Provenance) -> str:
    """Returns the text of a model card."""
    titled = {
        "Use": sections.use(about, provenance),
        "Base model and terms": sections.base(about, provenance),
        "Data": sections.data(provenance),
        "Training": sections.training(provenance),
        "Held-out results": sections.results(provenance),
        "Intended use and limits": sections.limits(provenance),
    }
    parts = [
        f"# {about.name}",
        sections.summary(about, provenance),
        *(f"## {name}\n\n{text}" for name, text in titled.items()),
    ]
    return f"---\n{_metadata(about, provenance).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def check_card_metadata(languages: tuple[str, ...], datasets: tuple[str, ...]) -> None:
    """Checks languages and data sets that a user gave for the card.

    Raises:
        ConfigError: A language or data set is not in Hugging Face's format.
    """
    for language in languages:
        if not re.fullmatch(_LANGUAGE, language):
            raise ConfigError(f"language must be codes of two or three letters, such as en,de; got {language!r}.")
    for dataset in datasets:
        if not re.fullmatch(_DATASET, dataset):
            raise ConfigError(f"datasets must be names on Hugging Face, such as OWNER/NAME; got {dataset!r}.")


def _metadata(about: About, provenance: Provenance) -> Any:
    from huggingface_hub import ModelCardData

    name = sections.license_of(about.family, provenance)
    results = _eval_results(provenance)
    languages = about.languages or (("en",) if provenance.data_source.startswith("sample:") else ())
    method = [provenance.config["training"]["method"]] if provenance.config else []
    return ModelCardData(
        license=name,
        license_link=sections.TERMS if name == "gemma" else None,
        base_model=provenance.hugging_face or None,
        library_name=about.library,
        pipeline_tag="text-generation",
        tags=["gemma", about.family, "gemma-tune", *method],
        language=list(languages) or None,
        datasets=list(about.datasets) or None,
        model_name=about.name if results else None,
        eval_results=results or None,
    )


def _eval_results(provenance: Provenance) -> list[Any]:
    from huggingface_hub import EvalResult

    after = provenance.result.get("heldout_after") or {}
    source = provenance.data_source.removeprefix("sample:").removeprefix(TFDS)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", Path(source).stem.lower()).strip("-") or "data",
            dataset_name=f"Held-out questions of {Path(source).name}",
            dataset_split="held-out",
            metric_type=metric,
            metric_name=f"{title} of responses",
            metric_value=round(float(after[name]), 6),
        )
        for name, metric, title in sections.METRICS
        if name in after
    ]
