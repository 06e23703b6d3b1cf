"""TFDS data sets in local directories, read without TensorFlow."""

import json
import os
import subprocess
import sys

import pytest

from gemma_tune.data import load_examples
from gemma_tune.data.sources.content_hash import source_fingerprint
from gemma_tune.errors import DataError

BUILDER = '''
import tensorflow_datasets as tfds

class SupportDesk(tfds.core.GeneratorBasedBuilder):
    """A data set."""
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"instruction": text, "response": text}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"instruction": f"Quéstion {i}", "response": f"Answer {i}"}
'''
PREPARE = "import sys, support_desk_dataset_builder as b; b.SupportDesk(data_dir=sys.argv[1], file_format='array_record').download_and_prepare()"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A prepared data set, made by TFDS itself in another process."""
    folder = tmp_path_factory.mktemp("tfds")
    (folder / "support_desk").mkdir()
    (folder / "support_desk" / "support_desk_dataset_builder.py").write_text(BUILDER)
    subprocess.run(
        [sys.executable, "-c", PREPARE, str(folder / "data")],
        cwd=folder / "support_desk",
        check=True,
        capture_output=True,
    )
    return folder / "data"


@pytest.mark.parametrize(("split", "count"), [("train", 5), ("test", 2), ("train[:40%]", 2)])
def test_by_name(data_dir, monkeypatch, split, count):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    examples = load_examples("tfds:support_desk", split)
    assert len(examples) == count
    assert {example.question for example in examples} <= {f"Quéstion {i}" for i in range(5)}
    assert examples[0].origin == "tfds:support_desk[1]"


def test_by_directory_and_without_tensorflow(data_dir):
    code = "import sys; from gemma_tune.data import load_examples; print(len(load_examples('tfds:' + sys.argv[1])), 'tensorflow' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, f"{data_dir}/support_desk/1.0.0"],
        env=os.environ,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["5", "False"]


def test_an_unknown_split_is_named(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    with pytest.raises(DataError, match="tfds:support_desk, split 'tset', can't be read"):
        load_examples("tfds:support_desk", "tset")


def test_a_fingerprint_knows_split_and_files(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    before = source_fingerprint("tfds:support_desk", "train")
    assert source_fingerprint("tfds:support_desk", "train") == before and "1.0.0" in json.dumps(before)
    assert source_fingerprint("tfds:support_desk", "test") != before
    file = next(path for path in data_dir.rglob("*train*") if path.is_file())
    os.utime(file, (1, 1))
    assert source_fingerprint("tfds:support_desk", "train") != before
