"""Parses sizes in bytes as a user writes them."""

import re


def parse_bytes(text: str) -> float:
    """Parses a size like `16GB`, `512MB` or `80GiB` and returns its bytes. A number without a unit is in GB.

    Raises:
        ValueError: The text is not such a size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(I?)(B?)\s*", text.upper())
    if not match or not float(match[1]):
        raise ValueError(f"{text!r} is not a size such as 16GB.")
    number, prefix, binary, _ = match.groups()
    return float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or "G")
