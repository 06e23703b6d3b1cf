"""Reads where a model comes from, as far as its files say: its base model, and the run that fine-tuned it."""

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any

from gemma_tune.config import Config
from gemma_tune.data.mixture import parse_mixture
from gemma_tune.data.sources.content_hash import source_fingerprint
from gemma_tune.data.sources.tfds import TFDS
from gemma_tune.errors import ConfigError, DataError, ModelError
from gemma_tune.export.options import EXPORT_MARKER
from gemma_tune.models.lora.adapter import adapter_path, read_adapter_metadata
from gemma_tune.models.sources.source import parse_source
from gemma_tune.runtime.json_files import read_json
from gemma_tune.workdir_config import with_found_paths

# Patterns of KerasHub's preset names, and the names of the same models on Hugging Face.
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
_OLD_KEY = "origin"  # Key of the provenance in exports of earlier versions.


@dataclasses.dataclass
class Provenance:
    """Where a model comes from. What isn't known is empty.

    Attributes:
        base: Name of the base model, as it was given.
        config, result, versions: Contents of the run's files of these names.
        adapter: Metadata of the LoRA adapter.
        data_files: SHA-256 of each file of the run's data as it is now, by file name.
    """

    base: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    result: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    adapter: dict[str, str] = dataclasses.field(default_factory=dict)
    data_files: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, of which `Provenance(**values)` makes an equal object."""
        return dataclasses.asdict(self)

    @property
    def data_source(self) -> str:
        """Source of the run's data, as it was given."""
        return str(self.config.get("data", {}).get("source", ""))

    @property
    def scheme(self) -> str:
        """Quantization scheme of the base during the run; '' for floats."""
        quant_spec = Config.from_saved(self.config).quant_spec if self.config else None
        return quant_spec.scheme if quant_spec else ""

    @property
    def is_tiny(self) -> bool:
        """Whether the base has random weights."""
        return self.base.startswith("tiny")

    @property
    def hugging_face(self) -> str:
        """Name of the base model on Hugging Face; '' if unknown."""
        return hugging_face_name(self.base)


def hugging_face_name(source: str) -> str:
    """Returns the OWNER/NAME on Hugging Face of a preset or an `hf://` source; '' if unknown."""
    if source.startswith("hf://"):
        return source.removeprefix("hf://")
    name = source.rpartition("/keras/")[2].partition("/")[0] if source.startswith("kaggle://") else source
    for pattern, hub_name in _ON_HUGGING_FACE:
        if match := re.fullmatch(pattern, name):
            return match.expand(hub_name)
    return ""


def read_provenance(source: str, adapter: str = "") -> Provenance:
    """Returns what the files of a source and an adapter say about their provenance.

    Missing or damaged files count as saying nothing.

    Args:
        source: Source as in `load_model`; '' if it is unknown.
        adapter: LoRA adapter that is put on the source.
    """
    provenance = Provenance(base=source)
    parsed = parse_source(source) if source else None
    folder = Path(parsed.value) if parsed and parsed.kind in ("run", "hf", "keras") else None
    if folder and parsed and parsed.kind == "run":
        provenance = _of_run(folder)
    elif folder:
        provenance = _of_export(folder) or provenance
    if adapter:
        provenance = _with_adapter(provenance, adapter_path(adapter))
    return provenance


def _of_run(workdir: Path) -> Provenance:
    saved = _read(workdir / "config.json")
    config = _current_config(saved)
    found = with_found_paths(saved, workdir) if config else Config()  # The card has the paths as they were given.
    provenance = Provenance(
        base=found.model.source if config else "",
        config=config,
        result=_read(workdir / "result.json") if config else {},
        versions=_read(workdir / "versions.json"),
    )
    if (workdir / "adapter").exists():
        provenance.adapter = _adapter_metadata(workdir / "adapter")
    if provenance.data_source and TFDS not in provenance.data_source:
        with contextlib.suppress(DataError):  # The files may have been moved or deleted.
            parts = parse_mixture(found.data.source)
            files = [file for part in parts for file in source_fingerprint(part.source, "")]
            provenance.data_files = {Path(path).name: digest for path, digest in files}
    return provenance


def _of_export(folder: Path) -> Provenance | None:
    marker = _read(folder / EXPORT_MARKER)
    saved = marker.get("provenance", marker.get(_OLD_KEY))
    if not isinstance(saved, dict):
        return None
    known = {field.name for field in dataclasses.fields(Provenance)}
    provenance = Provenance(**{name: value for name, value in saved.items() if name in known})
    return dataclasses.replace(provenance, config=_current_config(provenance.config))


def _with_adapter(provenance: Provenance, adapter: Path) -> Provenance:
    """Adds what is known of an adapter: all of its run, if it is in a workdir."""
    folder = adapter if adapter.is_dir() else adapter.parent
    if _read(folder.parent / "config.json").get("training"):
        run = _of_run(folder.parent)
        return dataclasses.replace(run, base=provenance.base or run.base)
    return dataclasses.replace(provenance, adapter=_adapter_metadata(adapter))


def _current_config(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns a saved config as this version has it; empty if it can't be read."""
    try:
        return Config.from_saved(saved).to_dict() if saved else {}
    except ConfigError:
        return {}


def _adapter_metadata(path: Path) -> dict[str, str]:
    try:
        metadata = read_adapter_metadata(path)
    except ModelError:
        return {}
    return {name: metadata[name] for name in ("rank", "alpha", "target_layers", "base_model", "base_fingerprint")
            if name in metadata}  # fmt: skip


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except ModelError:
        return {}
