"""Sources with weights: parsing, numbers of examples, and draws that the seed and the epoch alone decide."""

import collections

import numpy as np
import pytest

from gemma_tune.data import EpochPlan, load_splits
from gemma_tune.data.mixture import EpochSampler, MixturePart, examples_per_epoch, parse_mixture, source_labels
from gemma_tune.data.splits import heldout_source
from gemma_tune.errors import DataError


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("a.jsonl", [("a.jsonl", None, False)]),
        ("a.jsonl, b/*.csv", [("a.jsonl", None, False), ("b/*.csv", None, False)]),
        ("a.jsonl:0.7,b.parquet:.3", [("a.jsonl", 0.7, False), ("b.parquet", 0.3, False)]),
        ("a.jsonl:1x,b.jsonl:2.5x", [("a.jsonl", 1.0, True), ("b.jsonl", 2.5, True)]),
        ("sample:smartphone_support:3,b.jsonl:1", [("sample:smartphone_support", 3.0, False), ("b.jsonl", 1.0, False)]),
        ("tfds:mnist:3.0.1", [("tfds:mnist:3.0.1", None, False)]),
        ("tfds:3", [("tfds:3", None, False)]),
        ("hf://datasets/org/name:config@train:2", [("hf://datasets/org/name:config@train", 2.0, False)]),
        ("a.jsonl,a.jsonl", [("a.jsonl", None, False)]),
    ],
)
def test_sources_and_weights_are_told_apart(source, wanted):
    assert parse_mixture(source) == [MixturePart(*part) for part in wanted]


def test_a_file_whose_name_looks_like_a_mixture_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("odd:2", "a,b.jsonl"):
        (tmp_path / name).write_text("")
        assert parse_mixture(name) == [MixturePart(name)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a.jsonl:0.7,b.jsonl", "b.jsonl has no weight, but a.jsonl has"),
        ("a.jsonl:0.7,b.jsonl:2x", "a share of an epoch"),
        ("a.jsonl:0,b.jsonl:1", "a.jsonl has the weight 0"),
        ("a.jsonl:1,a.jsonl:2", "a.jsonl is named twice"),
    ],
)
def test_weights_that_make_no_sense_are_refused(source, message):
    with pytest.raises(DataError, match=message):
        parse_mixture(source)


def counts_of(sizes, source, **settings):
    return examples_per_epoch(sizes, parse_mixture(source), **settings).tolist()


def test_shares_keep_the_size_of_an_epoch():
    assert counts_of([900, 100], "a:0.7,b:0.3") == [700, 300]
    assert counts_of([900, 100], "a:7,b:3") == [700, 300]  # Only their ratio counts.
    assert sum(counts_of([10, 11, 13], "a:1,b:1,c:1")) == 34


def test_repeats_say_how_often_each_example_occurs():
    assert counts_of([900, 100], "a:1x,b:3x") == [900, 300]
    assert counts_of([900, 100], "a:0.5x,b:1x") == [450, 100]


def test_without_weights_each_example_occurs_once():
    assert counts_of([5, 0, 9], "a,b,c") == [5, 0, 9]


@pytest.mark.parametrize("temperature", [1, 2, 5])
def test_temperature_follows_its_formula(temperature):
    sizes = np.array([10_000, 100])
    rates = sizes ** (1 / temperature) / (sizes ** (1 / temperature)).sum()
    np.testing.assert_allclose(counts_of(sizes, "a,b", temperature=temperature), rates * 10_100, atol=1)


def test_limits_cut_a_source_and_shorten_the_epoch():
    assert counts_of([900, 10], "a:0.5,b:0.5") == [455, 455]
    assert counts_of([900, 10], "a:0.5,b:0.5", max_repeats=4) == [455, 40]
    assert counts_of([900, 10], "a:0.5,b:0.5", max_examples=200) == [200, 200]
    assert counts_of([900, 10], "a,b", max_examples=200) == [200, 10]


def test_a_weight_for_nothing_is_refused():
    with pytest.raises(DataError, match=r"b: no training example is left of it"):
        counts_of([9, 0], "a:1,b:1")


SOURCE_OF = np.array([0] * 30 + [1] * 7)


def test_draws_are_a_function_of_the_epoch():
    """A later epoch can be drawn without those before it, so a resumed run sees what the run would have seen."""
    first, second = (EpochSampler(SOURCE_OF, np.array([12, 20]), seed=5) for _ in range(2))
    in_order = [first.indices(epoch).tolist() for epoch in range(6)]
    assert [second.indices(epoch).tolist() for epoch in (4, 1)] == [in_order[4], in_order[1]]
    assert EpochSampler(SOURCE_OF, np.array([12, 20]), seed=6).indices(0).tolist() != in_order[0]
    assert in_order[0] != in_order[1]


def test_no_example_comes_again_before_all_others_of_its_source_came():
    sampler = EpochSampler(SOURCE_OF, np.array([12, 20]), seed=1)
    seen = collections.Counter()
    for epoch in range(7):
        drawn = sampler.indices(epoch)
        assert [int((SOURCE_OF[drawn] == number).sum()) for number in (0, 1)] == [12, 20]
        seen.update(drawn.tolist())
        for number in (0, 1):
            times = [seen[index] for index in np.flatnonzero(number == SOURCE_OF).tolist()]
            assert max(times) - min(times) <= 1


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_of_a_mixture_holds_what_was_drawn(packing, rng):
    lengths = rng.integers(1, 40, len(SOURCE_OF))
    sampler = EpochSampler(SOURCE_OF, np.array([12, 20]), seed=1)
    plan = EpochPlan(lengths, 40, packing, 3, sampler)
    for epoch in range(3):
        rows = plan.rows(epoch)
        assert sorted(i for row in rows for i in row) == sorted(sampler.indices(epoch).tolist())
        assert all(lengths[row].sum() <= 40 for row in rows)


def test_labels_are_short_and_each_is_there_once():
    assert source_labels(["x/a.jsonl", "y/a.jsonl", "chats/*.csv", "hf://datasets/o/n:c@t"]) == [
        "a.jsonl", "a.jsonl-2", "_.csv".strip("_"), "n_c_t",
    ]  # fmt: skip


def test_the_same_sources_are_held_out_without_their_weights():
    assert heldout_source("tfds:a:2,tfds:b/c:1.0.0:1", "", "test") == "tfds:a,tfds:b/c:1.0.0"
    assert heldout_source("a.jsonl:2,b.jsonl:1", "c.jsonl", "") == "c.jsonl"
    assert heldout_source("a.jsonl:2,b.jsonl:1", "", "") == ""


def test_weights_of_heldout_data_are_refused():
    with pytest.raises(DataError, match="held-out data has no weights"):
        load_splits(
            "a.jsonl", (), eval_source="b.jsonl:1", split="train", eval_split="", eval_fraction=0.1, system_prompt="",
            on_error="raise", dedup="normalized", near_dedup_threshold=0.0, seed=0,
        )  # fmt: skip


def test_duplicates_are_dropped_across_sources_and_counted_where_they_are(write):
    rows = [f'{{"prompt": "Where is gate {i}?", "completion": "At pier {i}."}}\n' for i in range(12)]
    first, second = write("a.jsonl", "".join(rows[:8])), write("b.jsonl", "".join(rows[6:]))
    splits = load_splits(
        f"{first}:0.5,{second}:0.5", (), eval_source="", split="train", eval_split="", eval_fraction=0.0,
        system_prompt="", on_error="raise", dedup="normalized", near_dedup_threshold=0.0, seed=0,
    )  # fmt: skip
    assert [(each["num_rows"], each["num_dropped"]) for each in splits.report.sources] == [(8, 0), (6, 2)]
    assert splits.train_sources.tolist() == [0] * 8 + [1] * 4
    assert [each["note"] for each in splits.report.samples["num_duplicates"]] == [f"like {first}:7", f"like {first}:8"]
