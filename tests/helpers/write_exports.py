"""Exports a tiny model with an adapter in several formats: `python write_exports.py FOLDER ADAPTER`, or from a test."""

import sys
from pathlib import Path

from gemma_tune.export import ExportOptions, export_model

OPTIONS = {
    "hf": ExportOptions(dtype="bfloat16", max_shard_size="200KB"),
    "peft": ExportOptions(),
    "gguf": ExportOptions(scheme="q4_k_m"),
}


def write_exports(folder, adapter):
    """Writes an export of each format into a folder of its name."""
    for name, options in OPTIONS.items():
        export_model("tiny", name, folder / name, adapter=str(adapter), options=options)


if __name__ == "__main__":
    write_exports(Path(sys.argv[1]), sys.argv[2])
