"""The shipped sample keeps its promises."""

import json
from collections import defaultdict

from gemma_tune.data import load_splits
from gemma_tune.data.cleaning import comparison_key
from gemma_tune.data.sources.locations.source_files import SAMPLES


def rows(part):
    path = SAMPLES / "smartphone_support" / f"{part}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_topics_pairs_and_phrasings():
    phrasings = defaultdict(set)
    for row in rows("train"):
        phrasings[row["topic"]].add(comparison_key(row["instruction"]))
    assert sum(map(len, phrasings.values())) == len(rows("train"))
    assert len(phrasings) == 67 and min(map(len, phrasings.values())) >= 9
    assert len(phrasings["hand_over"]) >= 190


def test_heldout_phrasings_are_new_and_of_the_same_topics():
    known = {comparison_key(row["instruction"]) for row in rows("train")}
    assert not known & {comparison_key(row["instruction"]) for row in rows("heldout")}
    assert {row["topic"] for row in rows("heldout")} <= {row["topic"] for row in rows("train")}


def test_each_topic_has_one_answer_and_no_other_topic_has_it():
    answers = defaultdict(set)
    for row in rows("train") + rows("heldout"):
        answers[row["topic"]].add(row["response"])
    assert all(len(texts) == 1 for texts in answers.values())
    assert len({text for texts in answers.values() for text in texts}) == len(answers)


def test_each_answer_begins_with_its_subject():
    subjects = defaultdict(set)
    for row in rows("train") + rows("heldout"):
        if row["topic"] != "hand_over":
            subject, colon, answer = row["response"].partition(": ")
            assert colon and len(subject.split()) <= 4 and len(answer.split()) >= 10
            subjects[row["topic"]].add(subject)
    assert all(len(names) == 1 for names in subjects.values())
    assert len(set().union(*subjects.values())) == len(subjects)


def test_its_column_of_topics_is_no_news(tmp_path):
    settings = {"split": "train", "eval_split": "", "eval_fraction": 0.1, "system_prompt": "", "on_error": "raise"}
    settings |= {"dedup": "normalized", "near_dedup_threshold": 0.0, "seed": 0}
    sample = load_splits("sample:smartphone_support", [], eval_source="", **settings)
    assert len(sample.train) == 790
    assert sample.report.notes == []
    copy = tmp_path / "train.jsonl"
    copy.write_bytes((SAMPLES / "smartphone_support/train.jsonl").read_bytes())
    (note,) = load_splits(str(copy), [], eval_source="", **settings).report.notes
    assert "not used: topic" in note


def test_the_worked_example_is_there():
    assert any("go to Settings > System > Reset options > Factory reset." in row["response"] for row in rows("train"))
