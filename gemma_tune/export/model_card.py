"""A model card (arXiv:1810.03993) as Hugging Face reads it: README.md with metadata in front, of what is known."""

import re
from pathlib import Path
from typing import Any

from gemma_tune.errors import ConfigError
from gemma_tune.export import card_sections as sections
from gemma_tune.export.card_sections import About
from gemma_tune.export.origin import Origin
from gemma_tune.files import write_text

CARD, NOTICE = "README.md", "NOTICE"
_LANGUAGE = r"[a-z]{2,3}|code|multilingual"
_DATASET = r"[\w.-]+/[\w.-]+|[\w.-]+"


def write_card(folder: Path, about: About, origin: Origin) -> None:
    """Writes README.md and, of a Gemma under Google's terms, the NOTICE that these ask for."""
    write_text(folder / CARD, model_card(about, origin))
    if sections.license_of(about.family, origin) == "gemma":
        write_text(folder / NOTICE, sections.NOTICE_TEXT)


def model_card(about: About, origin: Origin) -> str:
    """Returns the card's text."""
    titled = {
        "Use": sections.use(about, origin),
        "Base model and terms": sections.base(about, origin),
        "Data": sections.data(origin),
        "Training": sections.training(origin),
        "Held-out results": sections.results(origin),
        "Intended use and limits": sections.limits(origin),
    }
    parts = [
        f"# {about.name}",
        sections.summary(about, origin),
        *(f"## {name}\n\n{text}" for name, text in titled.items()),
    ]
    return f"---\n{_metadata(about, origin).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def check_words(languages: tuple[str, ...], datasets: tuple[str, ...]) -> None:
    """Raises ConfigError if a language or data set isn't of the form that Hugging Face asks for."""
    for language in languages:
        if not re.fullmatch(_LANGUAGE, language):
            raise ConfigError(f"language must be codes of two or three letters, such as en,de; got {language!r}.")
    for dataset in datasets:
        if not re.fullmatch(_DATASET, dataset):
            raise ConfigError(f"datasets must be names on Hugging Face, such as OWNER/NAME; got {dataset!r}.")


def _metadata(about: About, origin: Origin) -> Any:
    from huggingface_hub import ModelCardData

    name = sections.license_of(about.family, origin)
    results = _eval_results(origin)
    languages = about.languages or (("en",) if origin.data_source.startswith("sample:") else ())
    method = [origin.config["training"]["method"]] if origin.config else []
    return ModelCardData(
        license=name,
        license_link=sections.TERMS if name == "gemma" else None,
        base_model=origin.hugging_face or None,
        library_name=about.library,
        pipeline_tag="text-generation",
        tags=["gemma", about.family, "gemma-tune", *method],
        language=list(languages) or None,
        datasets=list(about.datasets) or None,
        model_name=about.name if results else None,
        eval_results=results or None,
    )


def _eval_results(origin: Origin) -> list[Any]:
    from huggingface_hub import EvalResult

    after = origin.result.get("heldout_after") or {}
    source = origin.data_source.rpartition(":")[2]
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
