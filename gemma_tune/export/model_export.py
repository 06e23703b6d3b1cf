"""Exports a model: loads it, puts LoRA where the format wants it, writes it whole, with a model card."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from gemma_tune.errors import ConfigError, ModelError
from gemma_tune.export.card.model_card import check_words, write_card
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
from gemma_tune.runtime.atomic_files import disk_errors_as, write_json
from gemma_tune.runtime.atomic_folder import atomic_folder, check_disk_space, check_output
from gemma_tune.runtime.backend import keras
from gemma_tune.version import __version__

_SPARE_BYTES = 50_000_000  # Tokenizer, card and the like.


@dataclasses.dataclass
class Export:
    """What an export came to.

    Attributes:
        output: The folder.
        format: Its name.
        next: The command that one would try it with.
        bytes: Of all files.
        files: Their names.
        notes: What is to be said of it, as sentences.
        seconds: It took.
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
    """Writes a model in a format that other programs read.

    Args:
        model: A source as in `load_model`, or a CausalLM, which stays as it is.
        format: A key of EXPORT_FORMATS.
        output: A folder that doesn't exist, or is empty.
        adapter: A LoRA adapter to put on a source.
        merge: Whether LoRA goes into the weights. None: as the format does usually.
        overwrite: An export that is there already is replaced, once the new one is whole.
        precision: To load a source in.
        seed: Of a tiny model's weights.
        provenance: Of a CausalLM: the workdir or source that it comes from, of which the model card then tells.
        options: Of the format.

    Returns:
        What was written.

    Raises:
        ConfigError: There is no such format, or it can't hold LoRA that way.
        ModelError: The output exists, the model or adapter can't be read or is of another base, the disk is too small,
            or the format can't hold this model; says why.
    """
    start = time.perf_counter()
    chosen = find_format(format)
    merges = _merges(format, chosen, merge)
    check_words(options.languages, options.dataset_names)
    path = check_output(output, overwrite, EXPORT_MARKER)
    known = read_provenance(model if isinstance(model, str) else provenance, adapter)
    options = dataclasses.replace(options, base_name=options.base_name or known.base)
    if isinstance(model, str):
        loaded = load_model(model, precision=precision, as_trained=not merges, adapter=adapter, seed=seed)
    else:
        loaded = shared_copy(model)
    notes = _put_lora(loaded, format, chosen, merges, known)
    check_disk_space(path, chosen.num_bytes(loaded, options) + _SPARE_BYTES)
    with disk_errors_as(ModelError, path), atomic_folder(path, replace=True) as folder:
        written = chosen.write(loaded, folder, options)
        notes += written.notes
        write_card(folder, _about(loaded, path.name, chosen, written._replace(notes=notes), options), known)
        mark = {"format": format, "gemma_tune": __version__, "notes": notes, "provenance": known.to_dict()}
        write_json(folder / EXPORT_MARKER, mark)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    names = [file.relative_to(path).as_posix() for file in files]
    num_bytes = sum(file.stat().st_size for file in files)
    following = next_command(written.kind, str(path), written.words)
    return Export(path, format, following, num_bytes, names, notes, time.perf_counter() - start)


def _put_lora(model: Any, name: str, chosen: ExportFormat, merges: bool, known: Provenance) -> list[str]:
    """Merges LoRA, if it is to be, and returns what is to be said of that."""
    if not lora_layers(model.backbone):
        if chosen.lora == "alone":
            raise ConfigError(f"There is no LoRA for --format={name}. Name a run that trained it, or an --adapter.")
        return []
    if not merges:
        return []
    merge_lora(model.backbone)
    if not known.scheme:
        return []
    return [f"The run trained on a base held in {known.scheme}; its LoRA is merged into the floats of that base."]


def _about(model: Any, name: str, chosen: ExportFormat, written: WrittenExport, options: ExportOptions) -> About:
    return About(
        name=name,
        kind=written.kind,
        library=chosen.library,
        notes=written.notes,
        family=family_of(model),
        num_params=num_weights(model),
        words=written.words,
        languages=options.languages,
        datasets=options.dataset_names,
    )


def _merges(name: str, chosen: ExportFormat, merge: bool | None) -> bool:
    """Whether LoRA is merged.

    Raises:
        ConfigError: The format can't hold it as asked.
    """
    if chosen.lora == "merged" and merge is False:
        raise ConfigError(f"--format={name} holds LoRA merged into the weights. --format=peft holds the factors alone.")
    if chosen.lora == "alone" and merge:
        raise ConfigError(f"--format={name} holds LoRA factors alone: there is nothing to merge them into.")
    return chosen.lora != "alone" and merge is not False
