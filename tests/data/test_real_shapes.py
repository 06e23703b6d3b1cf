"""A generated set in the shapes of public data sets, with their quirks: nearly all is kept, and the rest is named."""

import json
import random

import pytest

from gemma_tune.data.chat_template import all_control_tokens, template_for
from gemma_tune.data.cleaning import Cleaner
from gemma_tune.data.example import Row
from gemma_tune.data.rows.row_options import RowCounter
from gemma_tune.data.sources.row_formats import to_examples

NUM_ROWS = 2000


class Words:
    """Draws texts of which each holds a word of its own, so that one can look for it."""

    def __init__(self, seed):
        self.rng, self.number, self.answers = random.Random(seed), 0, []

    def text(self, is_answer=False):
        self.number += 1
        word = f"w{self.number}w"
        if is_answer:
            self.answers.append(word)
        ends = self.rng.choice([".", "?", "!", "\n\n    code()  # two  spaces", " ≠ é 日本", " <b>bold</b>", ": a\tb"])
        return f"{self.rng.choice(['Where', 'Why', 'The', 'It'])} {word} is{ends}"

    def chance(self, share):
        return self.rng.random() < share


def oasst(w):
    roles = ["prompter", "assistant"] * w.rng.randrange(1, 4) + ["prompter"] * w.chance(0.3)
    turns = [{"role": role, "text": w.text(role == "assistant")} for role in roles]
    return {"conversation": turns, "lang": "en", "tree_id": w.number}


def ultrachat(w):
    messages = [
        {"content": w.text(i % 2 == 1), "role": ("user", "assistant")[i % 2]} for i in range(2 * w.rng.randrange(1, 4))
    ]
    return {"prompt": messages[0]["content"], "prompt_id": "x", "messages": messages}


def sharegpt(w):
    names = w.rng.choice([("human", "gpt"), ("user", "chatgpt"), ("USER", "bing"), ("human", "bard")])
    turns = [{"from": names[i % 2], "value": w.text(i % 2 == 1)} for i in range(4)]
    if w.chance(0.1):
        turns.insert(0, {"from": names[1], "value": w.text()})
    if w.chance(0.1):
        turns.insert(2, {"from": names[0], "value": w.text()})
        turns[1], turns[2] = turns[2], turns[1]
    if w.chance(0.2):
        turns.insert(0, {"from": "system", "value": w.text()})
    return {"id": "x", "conversations": turns}


def dolly(w):
    context = w.text() if w.chance(0.4) else w.rng.choice(["", None])
    return {"instruction": w.text(), "context": context, "response": w.text(True), "category": "open_qa"}


def squad(w):
    answer = w.text(True)
    return {
        "id": "x",
        "title": "T",
        "context": w.text(),
        "question": w.text(),
        "answers": {"text": [answer, answer], "answer_start": [1, 1]},
    }


def helpful(w):
    """HH's transcripts, of which the chosen one was taken."""
    return {
        "chat": f"\n\nHuman: {w.text()}\n\nAssistant: {w.text(True)}\n\nHuman: {w.text()}\n\nAssistant: {w.text(True)}"
    }


def tool_calling(w):
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": json.dumps({"x": w.text(True)})}}
    nulls = dict.fromkeys(("name", "tool_call_id", "tool_calls"))
    return {
        "tools": [{"type": "function", "function": {"name": "find", "description": w.text(), "parameters": None}}],
        "messages": [
            {
                **nulls,
                "role": "user",
                "content": [{"type": "text", "text": w.text()}, {"type": "text", "text": w.text()}],
            },
            {**nulls, "role": "assistant", "content": w.rng.choice([None, ""]), "tool_calls": [call]},
            {**nulls, "role": "tool", "tool_call_id": "1", "content": w.text()},
            {**nulls, "role": "assistant", "content": w.text(True)},
        ],
    }


def thinking(w):
    return {
        "messages": [
            {"role": "user", "content": w.text()},
            {"role": "assistant", "content": w.text(True), "reasoning_content": w.text(True)},
        ]
    }


SHAPES = (oasst, ultrachat, sharegpt, dolly, squad, helpful, tool_calling, thinking)


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_nearly_all_is_kept_and_no_answer_is_lost(family):
    words = Words(7)
    rows = [Row(words.rng.choice(SHAPES)(words), f"set.jsonl:{i}") for i in range(1, NUM_ROWS + 1)]
    errors, counter = [], RowCounter()
    examples = list(to_examples(rows, errors.append, counter=counter))
    kept = [each.example for each in Cleaner(all_control_tokens()).clean(examples)]
    assert len(kept) >= 0.99 * NUM_ROWS and len(examples) + len(errors) == NUM_ROWS
    assert all("set.jsonl:" in str(error) for error in errors)
    template = template_for(family)
    learnt = "".join(span.text for example in kept for span in template.spans(example.turns) if span.is_target)
    everything = "".join(template.render(example.turns) for example in kept)
    assert not [word for word in words.answers if word not in learnt]
    # What isn't there at all was a question at the end, or stands twice in the row.
    lost = [f"w{number}w" for number in range(1, words.number + 1) if f"w{number}w" not in everything]
    assert len(lost) <= counter.changes["last_question_dropped"]
    (note,) = counter.notes()
    for column in ("lang", "tree_id", "prompt", "prompt_id", "id", "category", "title"):
        assert f" {column}," in note.replace(".", ",")


def test_a_lost_answer_would_be_seen():
    """Control: without its last turn, an answer is missing."""
    words = Words(1)
    row = ultrachat(words)
    row["messages"].pop()
    examples = list(to_examples([Row(row, "a:1"), Row(dolly(words), "b:1")], lambda error: None))
    text = "".join(template_for("gemma3").render(example.turns) for example in examples)
    assert [word for word in words.answers if word not in text]
