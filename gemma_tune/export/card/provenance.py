"""Where a model comes from, as far as its files say: its base, and the run that tuned it."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from gemma_tune.config import Config
from gemma_tune.data.sources.content_hash import source_fingerprint
from gemma_tune.data.sources.tfds import TFDS
from gemma_tune.errors import ConfigError, DataError, ModelError
from gemma_tune.export.options import EXPORT_MARKER
from gemma_tune.models.lora.adapter import read_adapter_metadata
from gemma_tune.models.sources.source import parse_source

# KerasHub's presets -> the same models on Hugging Face.
_ON_HUGGING_FACE = (
    (r"gemma_(\d+b)_en", r"google/gemma-\1"),
    (r"gemma_instruct_(\d+b)_en", r"google/gemma-\1-it"),
    (r"gemma_1\.1_instruct_(\d+b)_en", r"google/gemma-1.1-\1-it"),
    (r"gemma2_(\d+b)_en", r"google/gemma-2-\1"),
    (r"gemma2_instruct_(\d+b)_en", r"google/gemma-2-\1-it"),
    (r"gemma3_270m|demo", r"google/gemma-3-270m"),
    (r"gemma3_(\d+b)(?:_text)?", r"google/gemma-3-\1-pt"),
    (r"gemma3_instruct_(\d+[bm])(?:_text)?", r"google/gemma-3-\1-it"),
    (r"gemma4_([24])b", r"google/gemma-4-E\1B"),
    (r"gemma4_instruct_([24])b", r"google/gemma-4-E\1B-it"),
    (r"gemma4_26b_a4b", r"google/gemma-4-26B-A4B"),
    (r"gemma4_instruct_26b_a4b", r"google/gemma-4-26B-A4B-it"),
    (r"gemma4_31b", r"google/gemma-4-31B"),
    (r"gemma4_instruct_31b", r"google/gemma-4-31B-it"),
)
_OLD_KEY = "origin"  # The key in exports of earlier versions.


@dataclasses.dataclass
class Provenance:
    """Where a model comes from. What isn't known is empty.

    Attributes:
        base: The base model, as it was named.
        config, result, versions: The run's, as its files have them.
        adapter: What a LoRA adapter says of itself.
        data_files: File name -> SHA-256, of the run's data as they are now.
    """

    base: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    result: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    adapter: dict[str, str] = dataclasses.field(default_factory=dict)
    data_files: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, from which `Provenance(**values)` is the same."""
        return dataclasses.asdict(self)

    @property
    def data_source(self) -> str:
        """The run's data, as it was named."""
        return str(self.config.get("data", {}).get("source", ""))

    @property
    def scheme(self) -> str:
        """In which few bits the run held its base; '' for floats."""
        quant_spec = Config.from_saved(self.config).quant_spec if self.config else None
        return quant_spec.scheme if quant_spec else ""

    @property
    def is_tiny(self) -> bool:
        """Whether the base has random weights."""
        return self.base.startswith("tiny")

    @property
    def hugging_face(self) -> str:
        """The base's name on Hugging Face; '' if it isn't known to be there."""
        return hugging_face_name(self.base)


def hugging_face_name(source: str) -> str:
    """Returns OWNER/NAME of a preset or an `hf://` source, or ''."""
    if source.startswith("hf://"):
        return source.removeprefix("hf://")
    name = source.rpartition("/keras/")[2].partition("/")[0] if source.startswith("kaggle://") else source
    for pattern, there in _ON_HUGGING_FACE:
        if match := re.fullmatch(pattern, name):
            return match.expand(there)
    return ""


def read_provenance(source: str, adapter: str = "") -> Provenance:
    """Reads what a source and an adapter say of themselves. Files that are missing or damaged say nothing.

    Args:
        source: As in `load_model`; '' for a model that is at hand, of which nothing is known.
        adapter: On top of it.
    """
    provenance = Provenance(base=source)
    parsed = parse_source(source) if source else None
    folder = Path(parsed.value) if parsed and parsed.kind in ("run", "hf", "keras") else None
    if folder and parsed and parsed.kind == "run":
        provenance = _of_run(folder)
    elif folder and (before := _of_export(folder)):
        provenance = before
    if adapter:
        provenance = _with_adapter(provenance, Path(adapter).expanduser())
    return provenance


def _of_run(workdir: Path) -> Provenance:
    config = _json(workdir / "config.json")
    try:
        config = Config.from_saved(config).to_dict() if config else {}
    except ConfigError:  # Of another version.
        config = {}
    provenance = Provenance(
        base=config.get("model", {}).get("source", ""),
        config=config,
        result=_json(workdir / "result.json") if config else {},
        versions=_json(workdir / "versions.json"),
    )
    if (workdir / "adapter").exists():
        provenance.adapter = _adapter_metadata(workdir / "adapter")
    if provenance.data_source and not provenance.data_source.startswith(TFDS):
        with contextlib.suppress(DataError):  # They may be no longer where they were.
            files = source_fingerprint(provenance.data_source, "")
            provenance.data_files = {Path(path).name: digest for path, digest in files}
    return provenance


def _of_export(folder: Path) -> Provenance | None:
    mark = _json(folder / EXPORT_MARKER)
    saved = mark.get("provenance", mark.get(_OLD_KEY))
    if not isinstance(saved, dict):
        return None
    known = {field.name for field in dataclasses.fields(Provenance)}
    return Provenance(**{name: value for name, value in saved.items() if name in known})


def _with_adapter(provenance: Provenance, adapter: Path) -> Provenance:
    """An adapter in its run's workdir has the run beside it."""
    folder = adapter if adapter.is_dir() else adapter.parent
    if _json(folder.parent / "config.json").get("training"):
        run = _of_run(folder.parent)
        return dataclasses.replace(run, base=provenance.base or run.base)
    return dataclasses.replace(provenance, adapter=_adapter_metadata(adapter))


def _adapter_metadata(path: Path) -> dict[str, str]:
    try:
        metadata = read_adapter_metadata(path)
    except ModelError:
        return {}
    return {name: metadata[name] for name in ("rank", "alpha", "target_layers", "base_model", "base_fingerprint")
            if name in metadata}  # fmt: skip


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
