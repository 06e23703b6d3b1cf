"""Exports a model: loads it, merges LoRA if asked, and writes the format's files with a model card."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from gemma_tune.errors import ConfigError, ModelError
from gemma_tune.export.card.model_card import check_card_metadata, write_card
from gemma_tune.export.card.provenance import Provenance, read_provenance
from gemma_tune.export.card.sections import About
from gemma_tune.export.card.usage import next_command
from gemma_tune.export.export_formats import ExportFormat, find_format
from gemma_tune.export.options import DEFAULT_OPTIONS, EXPORT_MARKER, ExportOptions, WrittenExport
from gemma_tune.models.family import family_of
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.load import load_model
from gemma_tune.models.lora.enable import merge_lora
from gemma_tune.models.quantized.convert import num_weights
from gemma_tune.models.shared_copy import shared_copy
from gemma_tune.models.sources.source import source_of_folder
from gemma_tune.runtime.atomic_files import disk_errors_as, write_json
from gemma_tune.runtime.atomic_folder import atomic_folder, check_disk_space, check_output
from gemma_tune.runtime.backend import keras
from gemma_tune.version import __version__

_SPARE_BYTES = 50_000_000  # Disk space for the tokenizer, the model card and other small files.


@dataclasses.dataclass
class Export:
    """Result of an export.

    Attributes:
        output: Folder of the export.
        format: Name of its format.
        next: Command with which to try it.
        bytes: Size of all files together.
        files: Names of the files.
        notes: Sentences about the export that its users should read.
        seconds: Duration of the export.
    """

    output: Path
    format: str
    next: str
    bytes: int
    files: list[str]
    notes: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for `--json`."""
        return {**dataclasses.asdict(self), "output": str(self.output)}


def export_model(
    model: str | keras.Model,
    format: str,
    output: str | os.PathLike,
    *,
    adapter: str = "",
    merge: bool | None = None,
    overwrite: bool = False,
    precision: str = "float32",
    seed: int = 0,
    provenance: str = "",
    options: ExportOptions = DEFAULT_OPTIONS,
) -> Export:
    """Exports a model in a format that other programs read, with a model card.

    Args:
        model: Source as in `load_model`; or a CausalLM, which isn't changed.
        format: A key of EXPORT_FORMATS.
        output: Folder that doesn't exist or is empty.
        adapter: LoRA adapter to put on the model of a source.
        merge: Whether LoRA is merged into the weights. None: as is usual for the format.
        overwrite: Whether an earlier export is replaced, once the new one is complete.
        precision: Precision in which a source is loaded.
        seed: Random seed of a tiny model's weights.
        provenance: Workdir or source that a CausalLM comes from, for its model card.
        options: Options of the format.

    Raises:
        ConfigError: The format is unknown, or can't hold LoRA as asked.
        ModelError: The output exists; the model or adapter can't be read, or the adapter is of another base; the disk
            is too small; or the format can't represent the model.
    """
    start = time.perf_counter()
    chosen = find_format(format)
    merges = _is_merged(format, chosen, merge)
    check_card_metadata(options.languages, options.dataset_names)
    path = check_output(output, overwrite, EXPORT_MARKER)
    known = read_provenance(model if isinstance(model, str) else provenance, adapter)
    options = dataclasses.replace(options, base_name=options.base_name or known.base)
    if isinstance(model, str):
        loaded = load_model(model, precision=precision, as_trained=not merges, adapter=adapter, seed=seed)
    else:
        loaded = shared_copy(model)
    notes = _prepare_lora(loaded, format, chosen, merges, known)
    check_disk_space(path, chosen.estimate_bytes(loaded, options) + _SPARE_BYTES)
    with disk_errors_as(ModelError, path), atomic_folder(path, replace=True) as folder:
        written = chosen.write(loaded, folder, options)
        notes += written.notes
        write_card(folder, _about(loaded, path.name, chosen, written._replace(notes=notes), options), known)
        marker = {"format": format, "gemma_tune": __version__, "notes": notes, "provenance": known.to_dict()}
        write_json(folder / EXPORT_MARKER, marker)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return Export(
        output=path,
        format=format,
        next=next_command(written.usage, source_of_folder(path), written.placeholders),
        bytes=sum(file.stat().st_size for file in files),
        files=[file.relative_to(path).as_posix() for file in files],
        notes=notes,
        seconds=time.perf_counter() - start,
    )


def _prepare_lora(model: Any, name: str, chosen: ExportFormat, merges: bool, known: Provenance) -> list[str]:
    """Merges LoRA into the weights if asked, and returns notes on that.

    Raises:
        ConfigError: The format holds LoRA factors, and the model has none.
    """
    if not lora_layers(model.backbone):
        if chosen.lora == "alone":
            raise ConfigError(
                f"The model has no LoRA for --format={name}. Name a run that trained it, or an --adapter."
            )
        return []
    if not merges:
        return []
    merge_lora(model.backbone)
    if not known.scheme:
        return []
    return [f"LoRA was trained on a base in {known.scheme}; it is merged into the float weights of that base."]


def _about(model: Any, name: str, chosen: ExportFormat, written: WrittenExport, options: ExportOptions) -> About:
    return About(
        name=name,
        usage=written.usage,
        library=chosen.library,
        notes=written.notes,
        family=family_of(model),
        num_params=num_weights(model),
        placeholders=written.placeholders,
        languages=options.languages,
        datasets=options.dataset_names,
    )


def _is_merged(name: str, chosen: ExportFormat, merge: bool | None) -> bool:
    """Returns whether LoRA is to be merged.

    Raises:
        ConfigError: The format can't hold LoRA as asked.
    """
    if chosen.lora == "merged" and merge is False:
        raise ConfigError(f"--format={name} holds LoRA merged into the weights. --format=peft holds the factors alone.")
    if chosen.lora == "alone" and merge:
        raise ConfigError(f"--format={name} holds LoRA factors alone: there are no weights to merge them into.")
    return chosen.lora != "alone" and merge is not False
