"""Finds the files that hold a model's weights, and their size."""

from pathlib import Path

from gemma_tune.models.lora.adapter import ADAPTER_FILE
from gemma_tune.models.lora.peft_config import WEIGHTS_FILE
from gemma_tune.models.lora.peft_import import peft_base
from gemma_tune.models.sources.download import gguf_path
from gemma_tune.models.sources.source import config_with_base, parse_source


def weight_files(source: str) -> list[Path]:
    """Returns the weight files of a model that was loaded before; a tiny model has none.

    Args:
        source: Source as in `load_model`. The files of a run with an adapter are those of its base, and the adapter.
    """
    parsed = parse_source(source)
    path = Path(parsed.value)
    if parsed.kind == "tiny":
        return []
    if parsed.kind in ("demo", "gguf"):
        return [gguf_path(parsed)]
    if parsed.kind == "peft":
        return [*weight_files(peft_base(path)), path / WEIGHTS_FILE]
    if parsed.kind == "run":
        if (path / "model").exists():
            return weight_files(str(path / "model"))
        return [*weight_files(config_with_base(path).model.source), path / "adapter" / ADAPTER_FILE]
    if parsed.kind in ("hf", "hf_download"):
        return sorted((path if parsed.kind == "hf" else _hf_folder(parsed.value)).glob("*.safetensors"))
    return sorted((path if parsed.kind == "keras" else _keras_folder(parsed.value)).glob("model*.weights.h5"))


def weight_bytes(source: str) -> int | None:
    """Returns the size of a model's weight files in bytes, or None if it has none."""
    files = weight_files(source)
    return sum(file.stat().st_size for file in files) if files else None


def _hf_folder(handle: str) -> Path:
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(handle.removeprefix("hf://"), local_files_only=True))


def _keras_folder(handle: str) -> Path:
    from keras_hub.src.utils.preset_utils import get_file

    return Path(get_file(handle, "config.json")).parent
