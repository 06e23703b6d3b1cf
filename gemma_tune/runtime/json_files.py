"""Reads JSON files, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from gemma_tune.errors import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
        ModelError: The file is missing, or doesn't hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} should hold a JSON object, found {type(value).__name__}.")
    return value
