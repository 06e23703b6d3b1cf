"""What `benchmarks.fuzz` damages and reads: small whole files of each kind, and the damage."""

import gzip
import json
import random
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.errors import GemmaTuneError

_NUMBERS = (0, 1, 2, 3, 7, 8, 31, 127, 128, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
_TOKENS = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"-1", b"1e999", b"\\ud800", b"\xff", b"\x00", b"\n")
_SECONDS, _TIMES, _SPARE = 2, 100, 4 << 20  # A file's time, and its memory: so many times its bytes, and 4 MB.
_MOST_LOADS = 300  # Adapters put on a model, which takes a moment each.


class Reader(NamedTuple):
    """A reader: its file's ending, whole files to damage, what reads a file, and what mends a damaged file's seals."""

    suffix: str
    wholes: list[bytes]
    read: Callable[[Path], object]
    mend: Callable[[bytes, random.Random], bytes] = lambda content, generator: content


def too_long(number: int, frame: object) -> None:
    """Handles SIGALRM while a file is read."""
    raise TimeoutError(f"It took more than {_SECONDS} s.")


def try_one(reader: Reader, path: Path, num_bytes: int) -> tuple[str, str]:
    """Reads a file. Returns what came of it ("read", "refused" or "failed"), and what went wrong."""
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    result, problem = "read", ""
    try:
        reader.read(path)
    except GemmaTuneError as error:
        result = "refused"
        str(error).encode()  # It can be printed.
    except Exception as error:
        result, problem = "failed", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    taken = tracemalloc.get_traced_memory()[1] - before
    if taken > _TIMES * num_bytes + _SPARE:
        return "failed", f"It took {taken / 1e6:.1f} MB for {num_bytes} bytes."
    return result, problem


def damaged(whole: bytes, generator: random.Random) -> bytes:
    """Returns a file with one to four random changes."""
    content = bytearray(whole)
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        at = generator.randrange(len(content) + 1)
        length = min(generator.choice((1, 2, 8, 64, 1024)), len(content) - at)
        match generator.randrange(8):
            case 0 if content:
                content[min(at, len(content) - 1)] ^= 1 << generator.randrange(8)
            case 1:
                content[at : at + length] = generator.randbytes(length)
            case 2:
                del content[at:]
            case 3:
                del content[at : at + length]
            case 4:
                content[at:at] = content[at : at + length]
            case 5:
                size = generator.choice((1, 4, 8))
                number = generator.choice(_NUMBERS) % (1 << 8 * size)
                content[at : at + size] = number.to_bytes(size, "little")
            case 6:
                content[at : at + generator.randrange(3)] = generator.choice(_TOKENS)
            case _:
                other = generator.randrange(len(content) + 1)
                content[at : at + length] = content[other : other + length]
    return bytes(content)


def gguf_reader(folder: Path) -> Reader:
    """GGUF: the header, the config, the tokenizer, and every tensor dequantized."""
    import gguf

    from gemma_tune.models.sources.gguf_checkpoint import GgufCheckpoint
    from gemma_tune.models.sources.gguf_reader import GgufFile

    def write(name: str, kinds: list[gguf.GGMLQuantizationType]) -> bytes:
        writer = gguf.GGUFWriter(folder / name, "gemma3")
        for add in (
            "embedding_length",
            "block_count",
            "feed_forward_length",
            "head_count",
            "head_count_kv",
            "key_length",
        ):
            getattr(writer, f"add_{add}")(4)
        writer.add_sliding_window(16)
        writer.add_tokenizer_model("llama")
        writer.add_token_list([b"<pad>", b"<eos>", b"<bos>", b"<unk>", b"a", b" ", b"ab", b"\xe2\x96\x81"])
        writer.add_token_scores([0.0] * 8)
        writer.add_token_types([3, 3, 3, 3, 1, 1, 1, 1])
        for token, number in (("bos", 2), ("eos", 1), ("unk", 3), ("pad", 0)):
            getattr(writer, f"add_{token}_token_id")(number)
        values = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
        writer.add_tensor("output_norm.weight", values[0, :4])
        for index, kind in enumerate(kinds):
            raw = gguf.quants.quantize(values, kind)
            writer.add_tensor("token_embd.weight" if not index else f"t{index}", raw, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (folder / name).read_bytes()

    kinds = gguf.GGMLQuantizationType

    def read(path: Path) -> None:
        file = GgufFile(path)
        for name in file.tensors:
            file.tensor(name)
        GgufCheckpoint(path).tokenizer_proto()

    wholes = [write("a.gguf", [kinds.F32, kinds.F16]), write("b.gguf", [kinds.Q8_0, kinds.Q4_0, kinds.BF16])]
    return Reader(".gguf", wholes, read)


def adapter_reader(folder: Path) -> Reader:
    """Safetensors adapters: read whole, and put on the tiny model if they are taken for good."""
    from safetensors import SafetensorError
    from safetensors.numpy import load, save

    from gemma_tune.models.load import load_model
    from gemma_tune.models.lora.adapter import load_adapter, read_adapter_metadata, save_adapter
    from gemma_tune.models.lora.adapter_file import sealed_metadata
    from gemma_tune.models.lora.enable import enable_lora

    model = load_model("tiny:gemma")
    enable_lora(model.backbone, 2, 2.0, ["query"], seed=0)
    whole = save_adapter(model, folder, "tiny:gemma").read_bytes()

    def mend(content: bytes, generator: random.Random) -> bytes:
        if generator.random() < 0.5:
            return content
        factors, header = dict(load(whole)), _header(whole)
        name = generator.choice(sorted(factors))
        factors[name] = generator.choice(
            [
                factors[name].T,
                factors[name].astype(np.float16),
                factors[name] * np.nan,
                factors[name][..., :1],
                np.zeros(0),
            ]
        )
        if generator.random() < 0.3:
            del factors[generator.choice(sorted(factors))]
        key = generator.choice(sorted(header))
        header[key] = damaged(header[key].encode(), generator).decode("utf-8", errors="replace")
        try:
            return save(factors, sealed_metadata(header, factors))
        except (SafetensorError, ValueError):
            return content

    num_loads = 0

    def read(path: Path) -> None:
        nonlocal num_loads
        read_adapter_metadata(path)
        if num_loads < _MOST_LOADS:
            num_loads += 1
            load_adapter(load_model("tiny:gemma"), path)

    return Reader(".safetensors", [whole], read, mend)


def _header(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def jsonl_reader(folder: Path) -> Reader:
    """JSON Lines: read, cleaned, rendered, tokenized and packed."""
    del folder
    from gemma_tune.data.chat_template import template_for
    from gemma_tune.data.cleaning import Cleaner
    from gemma_tune.data.packing import make_batch, num_positions, plan_rows
    from gemma_tune.data.sources.readers import read_rows
    from gemma_tune.data.sources.row_formats import to_examples
    from gemma_tune.data.tokenize import tokenize_examples
    from gemma_tune.models.load import load_tokenizer

    template, tokenizer = template_for("gemma3"), load_tokenizer("tiny")[0]

    def read(path: Path) -> None:
        def skip(error: Exception) -> None:
            str(error).encode()

        cleaner = Cleaner(template.control_tokens)
        examples = list(to_examples(read_rows(str(path), "train", skip), skip))
        cleaned = [entry.example for entry in cleaner.clean(examples)]
        found = tokenize_examples(cleaned, template, tokenizer, 64, "truncate").examples
        stored = [found[index] for index in range(len(found))]
        rows = plan_rows([num_positions(tokens) for tokens in stored], 64)
        make_batch([[stored[index] for index in row] for row in rows], len(rows), 64)

    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "Wie groß? 📱"}, {"role": "assistant", "content": "6 Zoll.\n"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello\u200b there"}]},
        {"instruction": "Say", "input": "it", "response": "It."},
        {"prompt": "Why?", "completion": [{"role": "assistant", "content": "So."}]},
        {"text": "A document. " * 9},
    ]
    wholes = ["".join(json.dumps(row, ensure_ascii=bool(i % 2)) + "\n" for i in range(3)).encode() for row in rows]
    return Reader(".jsonl", [*wholes, gzip.compress(wholes[0])], read)


READERS = {"gguf": gguf_reader, "adapter": adapter_reader, "jsonl": jsonl_reader}


def ending(reader: Reader, whole: bytes) -> str:
    """Returns how the name of a file ends that is made from this one."""
    return reader.suffix + (".gz" if whole.startswith(b"\x1f\x8b") else "")
