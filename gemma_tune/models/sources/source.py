"""Parses the name of a model's source, before anything heavy is imported."""

from pathlib import Path
from typing import NamedTuple

from gemma_tune.config import Config
from gemma_tune.errors import ModelError, did_you_mean
from gemma_tune.quantization.spec import SCHEMES
from gemma_tune.runtime.json_files import read_json
from gemma_tune.workdir_config import missing_base, read_workdir_config

_TINY = ("tiny", "tiny:gemma", "tiny:gemma2", "tiny:gemma3", "tiny:gemma4")
_DEFAULT_TINY = "gemma3"


class Source(NamedTuple):
    """A source of a model.

    Attributes:
        kind: `tiny`, `demo`, `gguf`, `hf` or `keras` (directories), `hf_download`, `keras_download`, `run` (a workdir),
            or `peft` (an adapter's directory).
        value: Path, handle or preset; the family of a tiny model.
    """

    kind: str
    value: str


class SchemedSource(NamedTuple):
    """The name of a source with a quantization scheme, such as `demo@nf4`.

    Attributes:
        source: Name of the source.
        scheme: Quantization scheme; an empty string: as the source is.
    """

    source: str
    scheme: str = ""

    def __str__(self) -> str:
        return f"{self.source}@{self.scheme}" if self.scheme else self.source


def parse_schemed(name: str) -> SchemedSource:
    """Parses a name such as `demo@nf4`. If the whole name is an existing path, it is a source without a scheme.

    Raises:
        ModelError: The source or the scheme doesn't exist; the message suggests the nearest names.
    """
    source, at, scheme = name.rpartition("@")
    if not at or Path(name).expanduser().exists():
        source, scheme = name, ""
    elif scheme not in SCHEMES:
        raise ModelError(
            f"{name!r}: there is no scheme {scheme!r}.{did_you_mean(scheme, SCHEMES)} Write one of "
            f"{', '.join(SCHEMES)} after the @."
        )
    parse_source(source)
    return SchemedSource(source, scheme)


def parse_source(name: str) -> Source:
    """Returns the source that a name stands for.

    Raises:
        ModelError: The name is neither a preset, nor a file or directory that holds a model; the message suggests the
            nearest names.
    """
    if name == "demo":
        return Source("demo", name)
    if name == "tiny" or name.startswith("tiny:"):
        family = name.partition(":")[2] or _DEFAULT_TINY
        if f"tiny:{family}" not in _TINY:
            raise ModelError(f"There is no model {name!r}. Tiny models: {', '.join(_TINY)}.{did_you_mean(name, _TINY)}")
        return Source("tiny", family)
    if name.startswith("hf://"):
        return Source("hf_download", name)
    if "://" in name:
        if not name.startswith("kaggle://"):
            raise ModelError(f"{name!r}: models are downloaded from kaggle:// and hf:// only.")
        return Source("keras_download", name)
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(_kind_of_directory(path), str(path))
    if path.suffix == ".gguf":
        if not path.exists():
            raise ModelError(f"There is no file {path}.")
        return Source("gguf", str(path))
    from gemma_tune.models.sources.preset_catalog import preset_names

    presets = preset_names()
    if name in presets:
        return Source("keras_download", name)
    what = f"{path} is a file, but not a .gguf file." if path.exists() else f"There is no model {name!r}."
    raise ModelError(
        f"{what}{did_you_mean(name, ['demo', *_TINY, *presets])} A model is a preset (see `gemma-tune models`), "
        "kaggle://…, hf://…, a directory, a .gguf file, demo or tiny."
    )


def config_with_base(workdir: Path) -> Config:
    """Returns the Config of a run whose base model is to be loaded.

    Raises:
        ModelError: The base model isn't found; says where it was, and how to say where it is now.
    """
    config = read_workdir_config(workdir)
    try:
        parse_source(config.model.source)
    except ModelError as error:
        raise missing_base(workdir) from error
    return config


def source_of_folder(path: Path) -> str:
    """Returns a path as a source: with `./` in front where it would be taken for the name of a model."""
    name = str(path)
    return f"./{name}" if name == "demo" or name.partition(":")[0] == "tiny" else name


def _kind_of_directory(path: Path) -> str:
    config_file = path / "config.json"
    if not config_file.exists() and (path / "adapter_config.json").exists():
        return "peft"
    if not config_file.exists():
        gguf = sorted(path.glob("*.gguf"))
        hint = f" Name one of its files: {gguf[0]}" if gguf else ""
        raise ModelError(f"{path} holds no model: config.json is missing.{hint}")
    config = read_json(config_file)
    if "model_type" in config:
        return "hf"
    if "class_name" in config:
        return "keras"
    if "workdir" in config and "training" in config:
        return "run"
    raise ModelError(
        f"{config_file} describes neither a Keras preset, nor a Hugging Face model, nor a run of gemma_tune."
    )
