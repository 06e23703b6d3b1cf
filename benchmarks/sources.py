"""The demo model as each contender reads it."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

_NEEDS = {"peft_torch": ("peft", "transformers", "torch")}


def installed(contenders: Sequence[str]) -> list[str]:
    """Returns the contenders whose packages are there."""
    return [who for who in contenders if all(importlib.util.find_spec(name) for name in _NEEDS.get(who, ()))]


def demo_sources(folder: Path, contenders: Sequence[str]) -> dict[str, str]:
    """Returns contender -> where its model is; the tutorial's preset is written into the folder."""
    from gemma_tune.models.load import demo_path, load_model

    sources = {"ours": "demo", "peft_torch": str(demo_path())}
    if "tutorial" in contenders:
        load_model("demo").save_to_preset(str(folder / "preset"))
        sources["tutorial"] = str(folder / "preset")
    return {who: sources[who] for who in contenders}
