"""Damaged GGUF files are named, never a traceback of something else."""

import contextlib
import struct

import numpy as np
import pytest
from helpers.checkpoints import write_gguf

from gemma_tune.errors import ModelError
from gemma_tune.models.load import load_model
from gemma_tune.models.sources.gguf_checkpoint import GgufCheckpoint
from gemma_tune.models.sources.gguf_reader import GgufFile


@pytest.fixture
def path(tiny, tmp_path):
    return write_gguf(tiny("gemma3"), "gemma3", tmp_path / "m.gguf")


def test_it_reads_what_the_gguf_package_reads(path):
    import gguf

    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    assert ours.metadata["gemma3.block_count"] == theirs.fields["gemma3.block_count"].contents()
    assert [token.decode() for token in ours.metadata["tokenizer.ggml.tokens"]] == theirs.fields[
        "tokenizer.ggml.tokens"
    ].contents()
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(ours.tensor(tensor.name), gguf.quants.dequantize(tensor.data, tensor.tensor_type))


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.6, 0.999])
def test_truncated_files_are_refused(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(
        ModelError, match=r"m.gguf (is truncated|is damaged or truncated|can't be opened|is not a GGUF)"
    ):
        load_model(str(path))


@pytest.mark.parametrize(
    ("offset", "replacement", "message"),
    [
        (0, b"GGML", "is not a GGUF file"),
        (4, struct.pack("<I", 9), "has GGUF version 9"),
        (8, struct.pack("<Q", 2**60), "damaged|truncated|unknown quantization"),
        (16, struct.pack("<Q", 2**60), "damaged or truncated"),
        (24, struct.pack("<Q", 2**62), "damaged or truncated"),
    ],
)
def test_damaged_headers_are_refused(path, offset, replacement, message):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(replacement)] = replacement
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        GgufFile(path)


def test_random_damage_never_escapes(path, rng):
    """Bytes flipped at random in the header either leave it readable or raise ModelError."""
    content = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(0, 3000, 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(ModelError):
            GgufCheckpoint(path)


def test_other_architectures_are_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "l.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ModelError,
        match=r"holds a model of the architecture 'llama'. Gemma files of these can be read: gemma, gemma2, gemma3",
    ):
        load_model(str(tmp_path / "l.gguf"))


def test_the_scale_of_27b_is_known_by_its_layers(tiny, tmp_path):
    path = write_gguf(tiny("gemma3"), "gemma3", tmp_path / "m.gguf")
    assert GgufCheckpoint(path).config["query_pre_attn_scalar"] == 16
    content = path.read_bytes()
    key = b"gemma3.block_count"
    place = content.index(key) + len(key) + 4
    path.write_bytes(content[:place] + struct.pack("<I", 62) + content[place + 4 :])
    assert GgufCheckpoint(path).config["query_pre_attn_scalar"] == 64 // 4


@pytest.mark.parametrize("value", [0, -32])
def test_an_alignment_that_is_none_is_refused(path, value):
    content, key = path.read_bytes(), b"general.alignment"
    (count,) = struct.unpack_from("<Q", content, 16)
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<Ii", 5, value)
    path.write_bytes(content[:16] + struct.pack("<Q", count + 1) + entry + content[24:])
    with pytest.raises(ModelError, match=rf"general.alignment is {value}\."):
        GgufFile(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.bos_token_id", 10**6, r"its special tokens have the ids .*1000000"),
        ("tokenizer.ggml.bos_token_id", [b"2"], r"its special tokens have the ids"),
        ("general.architecture", b"\xff", r"architecture '\\\\xff'"),
    ],
)
def test_metadata_that_means_nothing_is_refused(path, monkeypatch, key, value, message):
    file = GgufFile(path)
    file.metadata[key] = value
    monkeypatch.setattr("gemma_tune.models.sources.gguf_checkpoint.GgufFile", lambda _: file)
    with pytest.raises(ModelError, match=message):
        GgufCheckpoint(path).tokenizer_proto()
