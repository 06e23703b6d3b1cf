"""Sizes in bytes as a user writes them."""

import pytest

from gemma_tune.runtime.byte_sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "value"),
    [("16GB", 16e9), ("16 gb", 16e9), ("512MB", 5.12e8), ("80GiB", 80 * 2**30), ("24", 24e9), ("1.5g", 1.5e9)],
)
def test_sizes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0"])
def test_no_sizes(text):
    with pytest.raises(ValueError):
        parse_bytes(text)
