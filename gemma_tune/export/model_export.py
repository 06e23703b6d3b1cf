"""Exports a model: loads it, puts LoRA where the format wants it, writes it whole, with a model card."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from gemma_tune.errors import ConfigError
from gemma_tune.export.formats import Format, find_format
from gemma_tune.export.options import Options
from gemma_tune.export.whole_folder import MARK, check_output, check_room, whole_folder
from gemma_tune.files import write_json
from gemma_tune.keras_runtime import keras
from gemma_tune.models.load import load_model
from gemma_tune.models.lora import lora_layers, merge_lora
from gemma_tune.models.shared_copy import shared_copy
from gemma_tune.version import __version__

_SPARE_BYTES = 50_000_000  # Tokenizer, card and the like.


@dataclasses.dataclass
class Export:
    """What an export came to.

    Attributes:
        output: The folder.
        format: Its name.
        bytes: Of all files.
        files: Their names.
        notes: What is to be said of it, as sentences.
        seconds: It took.
    """

    output: Path
    format: str
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
    options: Options = Options(),  # noqa: B008  (It is frozen.)
) -> Export:
    """Writes a model in a format that other programs read.

    Args:
        model: A source as in `load_model`, or a CausalLM, which stays as it is.
        format: A key of FORMATS.
        output: A folder that doesn't exist, or is empty.
        adapter: A LoRA adapter to put on a source.
        merge: Whether LoRA goes into the weights. None: as the format does usually.
        overwrite: An export that is there already is replaced, once the new one is whole.
        precision: To load a source in.
        seed: Of a tiny model's weights.
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
    path = check_output(output, overwrite)
    if isinstance(model, str):
        options = dataclasses.replace(options, base_name=options.base_name or model)
        loaded = load_model(model, precision=precision, as_trained=not merges, adapter=adapter, seed=seed)
    else:
        loaded = shared_copy(model)
    if chosen.lora == "alone" and not lora_layers(loaded.backbone):
        raise ConfigError(f"There is no LoRA for --format={format}. Name a run that trained it, or an --adapter.")
    if merges:
        merge_lora(loaded.backbone)
    check_room(path, chosen.estimate(loaded, options) + _SPARE_BYTES)
    with whole_folder(path) as folder:
        notes = chosen.write(loaded, folder, options)
        write_json(folder / MARK, {"format": format, "gemma_tune": __version__, "notes": notes})
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return Export(
        path,
        format,
        sum(file.stat().st_size for file in files),
        [file.relative_to(path).as_posix() for file in files],
        notes,
        time.perf_counter() - start,
    )


def _merges(name: str, chosen: Format, merge: bool | None) -> bool:
    """Whether LoRA is merged.

    Raises:
        ConfigError: The format can't hold it as asked.
    """
    if chosen.lora == "merged" and merge is False:
        raise ConfigError(f"--format={name} holds LoRA merged into the weights. --format=peft holds the factors alone.")
    if chosen.lora == "alone" and merge:
        raise ConfigError(f"--format={name} holds LoRA factors alone: there is nothing to merge them into.")
    return chosen.lora != "alone" and merge is not False
