"""Text token by token, against the text of all tokens at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.serving.text_stream import TextStream, without_outer_space

BYTES = st.lists(st.integers(0, 255), max_size=30)


def decode(tokens):
    """Tokens that are bytes, as a vocabulary with byte fallback has them."""
    return bytes(tokens).decode("utf-8", errors="replace")


def pieces(tokens, stops=()):
    stream = TextStream(decode, stops)
    found = []
    for token in tokens:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.finish()], stream


@given(st.text(max_size=20))
def test_all_pieces_are_the_text_and_no_character_is_cut(text):
    found, _ = pieces(text.encode())
    assert "".join(found) == text
    assert "\ufffd" not in "".join(found) or "\ufffd" in text


@given(BYTES)
def test_bytes_that_are_no_text_lose_nothing(tokens):
    assert "".join(pieces(tokens)[0]) == decode(tokens)


def test_a_character_comes_with_its_last_byte():
    assert pieces("aé€😀".encode())[0] == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string(text, stops):
    found, stream = pieces(text.encode(), stops)
    # The first at which any is complete, then the earliest beginning.
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    seen = text[: ends[0]] if ends else text
    places = [seen.find(stop) for stop in stops if stop in seen]
    assert "".join(found) == (seen[: min(places)] if places else text)
    assert stream.stopped == bool(places)


def test_what_may_become_a_stop_string_waits():
    stream = TextStream(decode, ["<end>"])
    assert [stream.push(token) for token in b"a<enx<end>"] == ["a", "", "", "", "<enx", "", "", "", "", ""]
    assert stream.stopped and stream.finish() == ""


@pytest.mark.parametrize("text", ["Grüße, 世界! 👩‍🚀\n\n  x", " leading", "a  b\tc"])
def test_the_tokenizer_s_pieces_are_its_text(tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text)
    stream = TextStream(tiny_tokenizer.decode)
    assert "".join([*map(stream.push, ids), stream.finish()]) == tiny_tokenizer.decode(ids) == text


@given(st.lists(st.text(" \n\tab", max_size=5), max_size=8))
def test_white_space_around_the_whole_is_left_out(parts):
    found = list(without_outer_space(parts))
    assert "".join(found) == "".join(parts).strip()
    assert all(found)


def test_text_comes_as_soon_as_it_cannot_be_outer_space():
    assert list(without_outer_space([" ", "a", " ", "b ", "c\n"])) == ["a", " b", " c"]
