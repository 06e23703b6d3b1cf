"""Data sets of the Hugging Face Hub: a small Hub on this machine serves them, and its cache serves them without it."""

import http.server
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.parse

import pyarrow
import pyarrow.parquet
import pytest

from gemma_tune.data.sources.locations.hub import may_be_on_hub, parse_hub
from gemma_tune.data.sources.locations.repository_layout import choose_files
from gemma_tune.errors import DataError

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
READ = """
import json, sys
from gemma_tune.data.sources.content_hash import source_fingerprint
from gemma_tune.data.sources.readers import read_rows
from gemma_tune.errors import DataError
def fail(error): raise error
for source, split in json.loads(sys.argv[1]):
    notes, rows, error = [], [], ""
    try:
        rows = [(dict(row.fields), row.origin) for row in read_rows(source, split, fail, notes.append)]
        notes.append(len(source_fingerprint(source, split)))
    except DataError as raised:
        error = str(raised)
    print(json.dumps([rows, notes, error]))
"""


def parquet(*texts):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": text} for text in texts]), buffer)
    return buffer.getvalue()


CARD = b"""---
configs:
- config_name: plain
  data_files:
  - split: train_sft
    path: data/train_sft-*
  - split: test
    path: ["data/test-*"]
- config_name: other
  data_files: other.jsonl
---
# A data set
"""
REPOSITORIES = {
    ("org/shards", "main"): {
        "README.md": b"# no front matter",
        "data/train-00000-of-00002.parquet": parquet("a", "b"),
        "data/train-00001-of-00002.parquet": parquet("c"),
        "data/test-00000-of-00001.parquet": parquet("t"),
        "train.jsonl": b'{"text": "the same again"}\n',
    },
    ("org/card", "main"): {
        "README.md": CARD,
        "data/train_sft-00000-of-00001.parquet": parquet("sft"),
        "data/train_gen-00000-of-00001.parquet": parquet("gen"),
        "data/test-00000-of-00001.parquet": parquet("t"),
        "other.jsonl": b'{"text": "o"}\n',
    },
    ("org/lines", "main"): {"lines-15k.jsonl": b'{"text": "x"}\n{"text": "y"}\n', "dataset_infos.json": b"{}"},
    ("org/script", "main"): {"script.py": b"", "data.bin": b""},
    ("org/script", "refs/convert/parquet"): {
        "default/partial-train/0000.parquet": parquet("converted"),
        "default/test/0000.parquet": parquet("t"),
    },
    ("org/parts", "main"): {"script.py": b""},
    ("org/parts", "refs/convert/parquet"): {f"default/train/000{i}.parquet": parquet(f"part {i}") for i in range(3)},
    ("org/nothing", "main"): {"pictures.bin": b""},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's HTTP interface that huggingface_hub asks for a data set."""

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def log_message(self, *_):
        pass

    def answer(self, with_body):
        parts = urllib.parse.urlsplit(self.path).path.split("/")
        api = parts[1] == "api"
        name = "/".join(parts[3:5] if api else parts[2:4])
        kind, revision, *rest = [*(parts[5:] if api else parts[4:]), "", ""]
        revision = urllib.parse.unquote(revision)
        revision = {COMMIT: "main", OTHER_COMMIT: "refs/convert/parquet"}.get(revision, revision)
        commit = COMMIT if revision == "main" else OTHER_COMMIT
        files = REPOSITORIES.get((name, revision))
        if files is None:
            known = any(repository == name for repository, _ in REPOSITORIES)
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        elif kind == "revision":
            info = {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
            self.reply(200, json.dumps(info).encode())
        elif kind == "tree":
            tree = [{"type": "file", "path": p, "size": len(c or b""), "oid": f"{hash(p):x}"} for p, c in files.items()]
            self.reply(200, json.dumps(tree).encode())
        else:
            content = files[urllib.parse.unquote("/".join(rest[:-2]))]
            if content is None:
                return
            headers = {"ETag": f'"{abs(hash(content)):x}"', "X-Repo-Commit": commit}
            self.reply(200, content, headers, with_body)

    def reply(self, status, content, headers=(), with_body=True):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)


@pytest.fixture(scope="module")
def hub():
    """Address of the small Hub."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def read(sources, endpoint, cache, **variables):
    """Reads sources in another process, whose Hub and cache these are; returns (texts, origins, notes, error) of each."""
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0", **variables,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(sources)], env=environment, check=True, capture_output=True, text=True
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return [([f["text"] for f, _ in rows], [o for _, o in rows], notes, error) for rows, notes, error in results]


@pytest.fixture(scope="module")
def downloaded(hub, tmp_path_factory):
    """A cache with data sets in it, and what reading them gave."""
    cache = tmp_path_factory.mktemp("hub")
    sources = [
        ("hf://datasets/org/shards", "train"),
        ("org/shards@test", "train"),
        ("org/card:plain", "train"),
        ("org/card:plain@train_sft", "train"),
        ("org/card:other", "train"),
        ("org/card", "train"),
        ("org/lines", "train"),
        ("org/script", "train"),
        ("org/nothing", "train"),
        ("org/missing", "train"),
        ("org/shards@test", "validation"),
        ("org/shards", "validation"),
    ]
    return cache, dict(zip([f"{source} {split}" for source, split in sources], read(sources, hub, cache), strict=True))


def test_the_parquet_files_of_one_split_are_read(downloaded):
    texts, origins, notes, _ = downloaded[1]["hf://datasets/org/shards train"]
    assert texts == ["a", "b", "c"] and notes == [2]
    assert origins[2] == "hf://datasets/org/shards/data/train-00001-of-00002.parquet[1]"
    assert downloaded[1]["org/shards@test train"][0] == ["t"]


def test_only_what_is_read_is_downloaded(downloaded):
    names = {path.name for path in downloaded[0].glob("datasets--org--shards/snapshots/*/**/*.*")}
    assert "train-00000-of-00002.parquet" in names and "train.jsonl" not in names


def test_the_card_says_which_files_a_configuration_and_a_split_have(downloaded):
    _, found = downloaded
    assert found["org/card:plain@train_sft train"][0] == ["sft"]
    assert found["org/card:other train"][0] == ["o"]
    assert (
        "has no split 'train'. It has train_sft, test: write @SPLIT behind its name" in found["org/card:plain train"][3]
    )
    assert (
        "has several configurations: plain, other. Name one as in hf://datasets/ORG/NAME:plain"
        in found["org/card train"][3]
    )


def test_other_formats_and_what_the_hub_has_converted(downloaded):
    _, found = downloaded
    assert found["org/lines train"][0] == ["x", "y"]
    texts, _, notes, _ = found["org/script train"]
    assert texts == ["converted"] and "converted only its first part" in notes[0]


def test_what_is_not_there_is_named(downloaded):
    _, found = downloaded
    assert found["org/nothing train"][3].startswith("hf://datasets/org/nothing has no files that can be read")
    assert found["org/missing train"][3].startswith("There is no file org/missing, so it was looked for on the Hugging")
    assert "hf://datasets/org/missing doesn't exist, or needs a login" in found["org/missing train"][3]
    assert "has no split 'validation'. It has test, train" in found["org/shards validation"][3]
    assert (
        "names the split 'test', but data.split or data.eval_split is 'validation'"
        in found["org/shards@test validation"][3]
    )


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline mode", "no network"])
def test_without_network_the_cache_is_read(downloaded, variables):
    cache, online = downloaded
    sources = ["org/shards train", "org/shards@test train", "org/card:plain@train_sft train", "org/script train"]
    started = time.monotonic()
    results = read([source.split(" ") for source in sources], "http://127.0.0.1:9", cache, **variables)
    for source, (texts, origins, notes, error) in zip(sources, results, strict=True):
        assert not error
        assert (texts, origins) == (online.get(source) or online["hf://datasets/org/shards train"])[:2]
        assert "its cache is read, commit" in notes[0]
    assert time.monotonic() - started < 30


def test_without_network_and_cache_one_message_says_how_to_get_it(tmp_path):
    ((_, _, _, error),) = read([("hf://datasets/org/shards", "train")], "http://127.0.0.1:9", tmp_path)
    assert "can't be downloaded" in error and "isn't in the Hub's cache" in error and "\n" not in error
    assert "hf download org/shards --repo-type=dataset --local-dir=FOLDER" in error


def test_an_interrupted_download_is_not_taken_for_the_whole_data_set(hub, tmp_path, monkeypatch):
    files = REPOSITORIES["org/parts", "refs/convert/parquet"]
    source, name = [("org/parts", "train")], "default/train/0002.parquet"
    monkeypatch.setitem(files, name, None)  # The connection breaks off.
    assert "the download was interrupted" in read(source, hub, tmp_path)[0][3]
    assert "is in the Hub's cache in part only" in read(source, "http://127.0.0.1:9", tmp_path)[0][3]
    monkeypatch.undo()
    assert read(source, hub, tmp_path)[0][0] == ["part 0", "part 1", "part 2"]
    assert read(source, "http://127.0.0.1:9", tmp_path)[0][0] == ["part 0", "part 1", "part 2"]


def test_a_half_downloaded_split_is_not_taken_for_a_whole_one(downloaded, tmp_path):
    names = ["data/train-00000-of-00003.parquet", "data/train-00002-of-00003.parquet"]
    with pytest.raises(DataError, match=r"1 of 3 files are missing, the first is data/train-00001-of-00003"):
        choose_files(names, None, "", "train", "hf://datasets/org/name")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf://datasets/org/name", ("org/name", "", "")),
        ("hf://datasets/org/name:en", ("org/name", "en", "")),
        ("hf://datasets/org/name.v2@test", ("org/name.v2", "", "test")),
        ("org/name:en_US@validation", ("org/name", "en_US", "validation")),
        ("hf://datasets/squad", ("squad", "", "")),
    ],
)
def test_addresses(source, expected):
    assert parse_hub(source) == expected


@pytest.mark.parametrize("source", ["hf://org/name", "hf://datasets/", "hf://datasets/a/b/c", "hf://datasets/a/b@c/d"])
def test_what_is_no_address_is_named(source):
    with pytest.raises(DataError, match="Write hf://datasets/ORG/NAME"):
        parse_hub(source)


def test_names_of_files_are_not_looked_for_on_the_hub():
    assert may_be_on_hub("org/name") and may_be_on_hub("org/name.v2")
    for name in ("a.jsonl", "data/a.jsonl", "data/a.csv.gz", "./a", "../a/b", "~/a", "/a/b", "a/b/c", "name", "a/*"):
        assert not may_be_on_hub(name)


def test_a_folder_of_each_configuration():
    names = ["english/train/0000.parquet", "german/train/0000.parquet", "german/test/0000.parquet"]
    assert choose_files(names, None, "german", "train", "hf://x").paths == ["german/train/0000.parquet"]
    with pytest.raises(DataError, match="has several configurations: english, german"):
        choose_files(names, None, "", "train", "hf://x")
    with pytest.raises(DataError, match=r"has no configuration 'germn', but english, german.* Did you mean german\?"):
        choose_files(names, None, "germn", "train", "hf://x")
    assert choose_files([*names, "default/train/0.parquet"], None, "", "train", "hf://x").paths == [
        "default/train/0.parquet"
    ]
