"""Streaming in chunks gives what holding everything in memory would; each setting and each byte of the data counts."""

import gc
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from gemma_tune.data import (
    Turn,
    chunks,
    cleaned_examples,
    load_examples,
    load_splits,
    template_for,
    tokenize,
    tokenize_splits,
)
from gemma_tune.data.chunks import garbage_collector_paused
from gemma_tune.data.cleaning import comparison_key, normalize
from gemma_tune.data.storage.cache import CONTENTS
from gemma_tune.errors import DataError

CONTROL = ("<end_of_turn>", "<bos>")
SETTINGS = {
    "eval_source": "", "split": "train", "eval_split": "", "eval_fraction": 0.2, "system_prompt": "", "on_error": "raise", "seed": 0,
    "dedup": "normalized", "near_dedup_threshold": 0.0,
}  # fmt: skip


class CountingTokenizer:
    """Counts what it encodes."""

    def __init__(self, tokenizer):
        self._tokenizer, self.num_texts = tokenizer, 0
        self.proto, self.bos_id, self.eos_id = tokenizer.proto, tokenizer.bos_id, tokenizer.eos_id

    def encode(self, text):
        self.num_texts += 1
        return self._tokenizer.encode(text)


@pytest.fixture
def counting(tiny_tokenizer):
    return CountingTokenizer(tiny_tokenizer)


def random_rows(seed, count):
    """Rows with repeated questions, spelt in different ways, empty and overlong ones, and some with control tokens."""
    rng = random.Random(seed)
    ways = (str.upper, lambda q: q + "!", lambda q: "  " + q.replace(" ", "   "), lambda q: q, lambda q: q)
    rows = []
    for _ in range(count):
        question = rng.choice(ways)(f"question number {rng.randrange(count // 4)}")
        question += rng.choice(["", "", "", " word" * 30, " <bos>"])
        answer = rng.choice(["yes", "no", "", "Go to settings. " * rng.randrange(1, 8), f"answer {rng.random()}"])
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if rng.random() < 0.2:
            turns.insert(0, {"role": "system", "content": rng.choice(["", "Be brief."])})
        if rng.random() < 0.2:
            turns += [{"role": "user", "content": "more"}, {"role": "assistant", "content": "indeed"}]
        rows.append({"messages": turns})
    return rows


def to_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def prepare(source, tokenizer, *, max_length=32, overlong="truncate", family="gemma3", cache=None, **changes):
    splits = load_splits(str(source), changes.pop("control_tokens", CONTROL), **{**SETTINGS, **changes}, cache=cache)
    return splits, tokenize_splits(splits, template_for(family), tokenizer, max_length, overlong, cache)


def reference_cleaned(source, system_prompt, counts):
    """Normalised, whole, without control tokens, each once; a list of (turns, question key)."""
    kept, seen = [], set()
    for example in load_examples(source):
        turns = [(turn.role, normalize(turn.content)) for turn in example.turns]
        turns = [turn for turn in turns if turn != ("system", "")]
        if "" in [content for _, content in turns]:
            counts["num_empty"] += 1
        elif any(token in content for _, content in turns for token in CONTROL):
            counts["num_control_tokens"] += 1
        elif (key := tuple((role, comparison_key(content)) for role, content in turns)) in seen:
            counts["num_duplicates"] += 1
        else:
            seen.add(key)
            question = next(comparison_key(content) for role, content in turns if role == "user")
            if system_prompt and turns[0][0] == "user":
                turns = [("system", system_prompt), *turns]
            kept.append((tuple(turns), question))
    return kept


def reference_splits(source, eval_source, fraction, system_prompt, seed, counts):
    cleaned = reference_cleaned(source, system_prompt, counts)
    if eval_source:
        heldout = reference_cleaned(eval_source, system_prompt, counts)
        taken = {question for _, question in heldout}
        train = [each for each in cleaned if each[1] not in taken]
        counts["num_in_heldout"] = len(cleaned) - len(train)
    else:
        place = {q: int(hashlib.sha256(f"{seed}\0{q}".encode()).hexdigest()[:16], 16) / 2**64 for _, q in cleaned}
        limit = max(fraction, min(place.values()))
        train = [each for each in cleaned if place[each[1]] > limit]
        heldout = [each for each in cleaned if place[each[1]] <= limit]
    return [[turns for turns, _ in part] for part in (train, heldout)]


def reference_tokens(part, tokenizer, max_length, overlong, counts, lengths):
    """For each example that is kept: (its place, ids, marks), by lists."""
    kept = []
    for place, turns in enumerate(part):
        ids, marks = [tokenizer.bos_id], [False]
        for span in template_for("gemma3").spans([Turn(*turn) for turn in turns]):
            ids += tokenizer.encode(span.text)
            marks += [span.is_target] * (len(ids) - len(marks))
        while not marks[-1] and any(marks):
            ids.pop(), marks.pop()
        lengths.append(len(ids))
        is_overlong = len(ids) > max_length + 1
        ids, marks = ids[: max_length + 1], marks[: max_length + 1]
        if is_overlong and overlong == "drop":
            counts["num_overlong_dropped"] += 1
        elif not any(marks):
            counts["num_without_target"] += 1
        else:
            counts["num_truncated"] += is_overlong
            kept.append((place, ids, marks))
    return kept


def pairs(example):
    return tuple((turn.role, turn.content) for turn in example.turns)


COUNTS = (
    "num_empty", "num_control_tokens", "num_duplicates", "num_in_heldout", "num_truncated", "num_overlong_dropped",
    "num_without_target",
)  # fmt: skip


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
@pytest.mark.parametrize("has_eval_source", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_streaming_gives_what_lists_in_memory_give(write, monkeypatch, tiny_tokenizer, seed, has_eval_source, overlong):
    # Many borders between chunks, and a last one that isn't full.
    monkeypatch.setattr(chunks, "EXAMPLES_PER_CHUNK", 7)
    source = str(write("train.jsonl", to_jsonl(random_rows(seed, 150))))
    eval_source = str(write("eval.jsonl", to_jsonl(random_rows(seed + 100, 20)))) if has_eval_source else ""
    system_prompt = "Answer." if seed == 1 else ""
    changes = {"eval_source": eval_source, "system_prompt": system_prompt, "seed": seed}
    splits, data = prepare(source, tiny_tokenizer, overlong=overlong, **changes)

    counts, lengths = dict.fromkeys(COUNTS, 0), []
    wanted = reference_splits(source, eval_source, 0.2, system_prompt, seed, counts)
    for examples, part in zip((splits.train, splits.heldout), wanted, strict=True):
        assert [pairs(example) for example in examples] == part
    for tokens, part in zip((data.train, data.heldout), wanted, strict=True):
        kept = reference_tokens(part, tiny_tokenizer, 32, overlong, counts, lengths)
        assert [(t.token_ids.tolist(), t.is_target.tolist()) for t in tokens] == [
            (ids, marks) for _, ids, marks in kept
        ]
        assert tokens.counts.num_tokens.tolist() == [len(ids) for _, ids, _ in kept]
        assert tokens.counts.num_targets.tolist() == [sum(marks) for *_, marks in kept]
    assert [pairs(example) for example in data.heldout_examples] == [wanted[1][place] for place, *_ in kept]
    assert {name: getattr(data.report, name) for name in COUNTS} == counts
    assert data.report.lengths.tolist() == lengths
    assert (data.report.num_train, data.report.num_heldout) == (len(data.train), len(data.heldout))
    assert min(counts["num_empty"], counts["num_control_tokens"], counts["num_duplicates"]) > 0  # All kinds occurred.
    assert counts["num_without_target"] + counts["num_overlong_dropped"] > 0


def test_parallel_gives_the_same_ids(write, monkeypatch, counting):
    source = write("a.jsonl", to_jsonl(random_rows(0, 200)))
    _, serial = prepare(source, counting)
    num_serial = counting.num_texts
    assert num_serial > 100
    monkeypatch.setattr(tokenize, "MIN_PARALLEL_EXAMPLES", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    _, parallel = prepare(source, counting)
    assert counting.num_texts == num_serial  # The other way was taken.
    for ours, theirs in zip(parallel.train, serial.train, strict=True):
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)


def test_a_second_run_reads_no_row_and_tokenizes_nothing(write, monkeypatch, tmp_path, counting):
    source = write("a.jsonl", to_jsonl(random_rows(0, 60)) + "broken\n")
    first_splits, first = prepare(source, counting, cache=tmp_path, on_error="skip")
    num_texts = counting.num_texts
    monkeypatch.setattr(cleaned_examples, "read_rows", lambda *_: pytest.fail("a row was read"))
    splits, second = prepare(source, counting, cache=tmp_path, on_error="skip")
    assert num_texts and counting.num_texts == num_texts
    assert second.report.to_dict() == first.report.to_dict() and len(second.report.errors) == 1
    assert list(splits.train) == list(first_splits.train)
    assert list(second.heldout_examples) == list(first.heldout_examples)
    for ours, theirs in zip(second.train, first.train, strict=True):
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(ours.is_target, theirs.is_target)


@pytest.mark.parametrize(
    ("changes", "splits_anew"),
    [
        ({"eval_source": "{}/other.jsonl"}, True),
        ({"split": "test"}, True),  # A JSON file may hold several.
        ({"eval_source": "{}/other.jsonl", "eval_split": "train"}, True),
        ({"eval_fraction": 0.3}, True),
        ({"system_prompt": "S"}, True),
        ({"on_error": "skip"}, True),
        ({"dedup": "exact"}, True),
        ({"near_dedup_threshold": 0.9}, True),
        ({"seed": 1}, True),
        ({"control_tokens": ("<eos>",)}, True),
        ({"max_length": 33}, False),
        ({"overlong": "drop"}, False),
        ({"overlong": "chunk"}, False),
        ({"family": "gemma4"}, False),
    ],
)
def test_each_setting_that_matters_is_in_the_key(write, tmp_path, counting, changes, splits_anew):
    source = write("a.jsonl", to_jsonl(random_rows(0, 40)))
    write("other.jsonl", to_jsonl(random_rows(1, 10)))
    cache = tmp_path / "cache"
    prepare(source, counting, cache=cache)
    changes = {key: value.format(tmp_path) if key == "eval_source" else value for key, value in changes.items()}
    prepare(source, counting, cache=cache, **changes)
    assert len(list((cache / "examples").iterdir())) == 1 + splits_anew
    assert len(list((cache / "tokens").iterdir())) == 1 + (splits_anew or "split" not in changes)


def test_another_tokenizer_has_another_key(write, tmp_path, counting):
    source = write("a.jsonl", to_jsonl(random_rows(0, 40)))
    prepare(source, counting, cache=tmp_path)
    counting.proto += b"\x00"
    prepare(source, counting, cache=tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 2


@pytest.mark.parametrize("zipped", [False, True])
def test_changed_bytes_are_noticed(write, tmp_path, counting, zipped):
    name, pack = ("a.jsonl.gz", gzip.compress) if zipped else ("a.jsonl", bytes)
    text = to_jsonl(random_rows(0, 40))
    source = write(name, pack(text.encode()))
    times = source.stat()
    prepare(source, counting, cache=tmp_path / "cache")
    write(name, pack(text.replace("yes", "yep").encode()))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))  # Neither size nor time tells.
    splits, _ = prepare(source, counting, cache=tmp_path / "cache")
    assert "yep" in {example.answer for example in splits.train}


@pytest.mark.parametrize("kind", ["examples", "tokens"])
@pytest.mark.parametrize("damage", ["cut", "missing", "no contents", "broken contents", "grown"])
def test_a_damaged_entry_is_built_again(write, tmp_path, counting, kind, damage):
    source = write("a.jsonl", to_jsonl(random_rows(0, 40)))
    cache = tmp_path / "cache"
    _, wanted = prepare(source, counting, cache=cache)
    (entry,) = (cache / kind).iterdir()
    file = max((path for path in entry.iterdir() if path.name != CONTENTS), key=lambda path: path.stat().st_size)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "grown":
        file.write_bytes(file.read_bytes() + b"0")
    elif damage == "missing":
        file.unlink()
    elif damage == "no contents":
        (entry / CONTENTS).unlink()
    else:
        (entry / CONTENTS).write_text('{"sizes": {')
    before = counting.num_texts
    _, data = prepare(source, counting, cache=cache)
    assert (counting.num_texts > before) == (kind == "tokens")
    for ours, theirs in zip(data.train, wanted.train, strict=True):
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
    assert list((cache / kind).iterdir()) == [entry] and json.loads((entry / CONTENTS).read_text())


def test_a_failed_run_leaves_nothing_behind(write, tmp_path, counting):
    source = write("a.jsonl", to_jsonl(random_rows(0, 40)) + "broken\n")
    with pytest.raises(DataError, match=r"a.jsonl:41: not valid JSON"):
        prepare(source, counting, cache=tmp_path / "cache")
    with pytest.raises(DataError, match=r"too many for data.max_length=8"):
        prepare(source, counting, cache=tmp_path / "cache", on_error="skip", overlong="error", max_length=8)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_done_without(write, tmp_path, counting):
    source = write("a.jsonl", to_jsonl(random_rows(0, 40)))
    (tmp_path / "cache").write_text("a file where the folder should be")
    _, data = prepare(source, counting, cache=tmp_path / "cache")
    assert len(data.train) == data.report.num_train > 0


def test_nothing_stays_without_a_cache(write, tmp_path, monkeypatch, counting):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    splits, data = prepare(write("a.jsonl", to_jsonl(random_rows(0, 40))), counting)
    assert len(list((tmp_path / "temporary").iterdir())) == 2
    heldout = data.heldout_examples
    del splits, data
    assert len(heldout[0].turns) >= 2  # Conversations keep their folder; the tokens' is gone.
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    del heldout
    assert list((tmp_path / "temporary").iterdir()) == []


def test_memory_does_not_grow_with_the_data(write, monkeypatch, tiny_tokenizer):
    monkeypatch.setattr(chunks, "EXAMPLES_PER_CHUNK", 200)
    monkeypatch.setattr(tokenize, "MIN_PARALLEL_EXAMPLES", 1)
    peaks = []
    for count in (2_000, 8_000):
        lines = (f'{{"prompt": "What is {i} and {i} again?", "completion": "{2 * i}."}}\n' for i in range(count))
        source = write(f"{count}.jsonl", "".join(lines))
        tracemalloc.start()
        splits, data = prepare(source, tiny_tokenizer)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(data.train) + len(data.heldout) == len(splits.train) + len(splits.heldout) == count
    # What stays of an example: two hashes, its place, its length and offsets, and copies of these arrays for a moment:
    # some 100 bytes. As Python objects it takes 600 (its Example), and its tokens as much again.
    assert peaks[1] - peaks[0] < 6_000 * 150


def test_nothing_is_left_for_the_garbage_collector(write, tiny_tokenizer):
    """It is paused, so what only it could free would pile up: rows, unreadable ones among them."""
    found = []
    for count in (10, 1000):
        source = write(
            f"{count}.jsonl", (to_jsonl(random_rows(0, 10)) + "broken\n[1]\n" + '{"text": 1}\n') * (count // 10)
        )
        gc.collect()
        with garbage_collector_paused():
            prepare(source, tiny_tokenizer, on_error="skip")
            found.append(gc.collect())
    assert gc.isenabled() and found[1] < found[0] + 100


def test_preparing_imports_neither_keras_nor_jax(write):
    source = write("a.jsonl", to_jsonl(random_rows(0, 40)))
    code = (
        "import sys; from gemma_tune.data import load_splits\n"
        f"load_splits(sys.argv[1], [], **{SETTINGS!r})\n"
        "print([name for name in ('keras', 'jax', 'tensorflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(source)], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
