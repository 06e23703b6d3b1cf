"""Data sets as the Python package datasets itself saves them: `pip install -e '.[peers]'`, then `pytest -m peers`."""

import pytest
from helpers.skips import needs

from gemma_tune.data import load_examples
from gemma_tune.data.sources.readers import read_rows

pytestmark = [pytest.mark.peers, needs("datasets", "peers")]
ROWS = [{"prompt": f"Question {i}?", "completion": f"Answer {i}, é.", "topic": i % 2} for i in range(20)]


def rows_of(source, split="train"):
    return [dict(row.fields) for row in read_rows(str(source), split, pytest.fail)]


@pytest.fixture
def dataset():
    import datasets

    features = datasets.Features(
        {"prompt": datasets.Value("string"), "completion": datasets.Value("string"), "topic": datasets.ClassLabel(names=["no", "yes"])}
    )  # fmt: skip
    return datasets.Dataset.from_list(ROWS, features=features)


def as_it_gives_them(dataset):
    names = dataset.features["topic"].names
    return [{**row, "topic": names[row["topic"]]} for row in dataset]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_save_to_disk_in_one_or_several_files_and_in_another_order(dataset, tmp_path, num_shards):
    shuffled = dataset.shuffle(seed=0).select(range(15))
    shuffled.save_to_disk(tmp_path / "saved", num_shards=num_shards)
    assert rows_of(tmp_path / "saved") == as_it_gives_them(shuffled)
    assert len(load_examples(str(tmp_path / "saved"))) == 15


def test_a_dict_of_splits(dataset, tmp_path):
    splits = dataset.train_test_split(test_size=5, seed=0)
    splits.save_to_disk(tmp_path / "saved")
    for name in ("train", "test"):
        assert rows_of(tmp_path / "saved", name) == as_it_gives_them(splits[name])


def test_what_it_writes_as_parquet_json_and_csv(dataset, tmp_path):
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.to_json(tmp_path / "a.jsonl")
    dataset.to_csv(tmp_path / "a.csv")
    assert rows_of(tmp_path / "a.parquet") == as_it_gives_them(dataset)
    for name in ("a.jsonl", "a.csv"):
        assert [row["prompt"] for row in rows_of(tmp_path / name)] == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize("orient", ["columns", "records", "list"])
def test_what_pandas_writes_as_json(dataset, tmp_path, orient):
    import json

    frame = dataset.to_pandas()[["prompt", "completion"]]
    if orient == "list":
        (tmp_path / "a.json").write_text(json.dumps(frame.to_dict(orient="list")))
    else:
        frame.to_json(tmp_path / "a.json", orient=orient)
    assert rows_of(tmp_path / "a.json") == [{"prompt": r["prompt"], "completion": r["completion"]} for r in ROWS]


def test_what_pandas_writes_as_csv_for_excel_in_europe(dataset, tmp_path):
    frame = dataset.to_pandas()[["prompt", "completion"]]
    for encoding in ("cp1252", "utf-16", "utf-8-sig"):
        frame.to_csv(tmp_path / "a.csv", sep=";", index=False, encoding=encoding)
        assert rows_of(tmp_path / "a.csv") == [{"prompt": r["prompt"], "completion": r["completion"]} for r in ROWS]
