"""Templates that were applied to a text before."""

import pytest

from gemma_tune.data import Turn, template_for
from gemma_tune.data.example import Row
from gemma_tune.data.rows.ready_made import other_template, parse_gemma_text, without_end_tokens
from gemma_tune.data.rows.row_options import RowCounter
from gemma_tune.data.sources.row_formats import to_examples

TURNS = (
    Turn("user", "Where is\nthe lift?"),
    Turn("model", "Behind you."),
    Turn("user", "Thanks"),
    Turn("model", "Bye"),
)


def read_one(fields):
    counter = RowCounter()
    (example,) = to_examples([Row(fields, "a.jsonl:1")], pytest.fail, counter=counter)
    return example.turns, dict(counter.changes), counter.notes()


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_rendering_is_undone(family):
    text = template_for(family).render(TURNS)
    for variant in (text, text.removeprefix("<bos>"), text.strip() + "<eos>"):
        assert read_one({"text": variant}) == (TURNS, {"templates_parsed": 1}, [])


def test_a_rendered_prompt_with_an_answer():
    template = template_for("gemma3")
    prompt = template.render(TURNS[:3], add_generation_prompt=True)
    assert read_one({"prompt": prompt, "completion": "Bye<end_of_turn>"})[0] == TURNS


@pytest.mark.parametrize(
    "text",
    [
        "About <start_of_turn> and more",
        "before <start_of_turn>user\nQ<end_of_turn>\n",
        "<start_of_turn>user\nQ<end_of_turn>\nloose text",
        "<start_of_turn>narrator\nQ<end_of_turn>\n",
        "<start_of_turn>user\nQ<start_of_turn>model\nA<end_of_turn>\n",
        "<start_of_turn>model\n<start_function_call>call:f{}<end_function_call><end_of_turn>\n",
        "No token at all.",
    ],
)
def test_what_is_no_rendered_chat_as_a_whole_stays_a_document(text):
    assert parse_gemma_text(text) is None
    assert read_one({"text": text})[0][0].role == "text"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A.<end_of_turn>", "A."), ("A.<end_of_turn>\n<eos>", "A."), ("<bos>A.", "A."), ("A.<turn|>", "A."), ("A.<|im_end|>\n", "A."),
        ("A.</s>", "A."), ("<s>gone</s>", "<s>gone</s>"), ("The token `<eos>` ends it.", "The token `<eos>` ends it."), ("a <b> c>", "a <b> c>"),
    ],
)  # fmt: skip
def test_control_tokens_at_an_end_are_removed(text, kept):
    changes = []
    assert without_end_tokens(text, changes) == kept
    assert bool(changes) == (text != kept)
    for fields in ({"prompt": "Q", "completion": text}, {"messages": ["Q", text]}):
        assert read_one(fields)[0][-1].content.strip() == kept


@pytest.mark.parametrize(
    ("text", "is_template"),
    [
        ("### Instruction:\nQ\n\n### Response:\nA", True),
        ("<|im_start|>user\nQ<|im_end|>", True),
        ("[INST] Q [/INST] A", True),
        ("Human: Q\n\nAssistant: A", True),
        ("# Title\n\n## Questions: many", False),
        ("The assistant: a play", False),
    ],
)
def test_other_templates_are_kept_and_said(text, is_template):
    assert bool(other_template(text)) == is_template
    turns, changes, notes = read_one({"text": text})
    assert turns[0].content.startswith(text[:10])
    assert (changes.get("other_templates", 0), len(notes)) == (int(is_template), int(is_template))


def test_an_example_has_one_bos_and_no_spelled_out_tokens(tiny_tokenizer):
    from gemma_tune.data import Example
    from gemma_tune.data.tokenize import tokenize_examples

    template = template_for("gemma3")
    texts = [template.render(TURNS), "<bos>A plain text.<eos>", "### Question:\nQ\n### Answer:\nA<eos>"]
    examples = [Example(read_one({"text": text})[0]) for text in texts]
    tokens = tokenize_examples(examples, template, tiny_tokenizer, 200, "error").examples
    letters = tiny_tokenizer.encode("<bos>")  # As letters: `<bos>` in a text is no token.
    for each in tokens:
        ids = each.token_ids.tolist()
        assert ids.count(tiny_tokenizer.bos_id) == 1 and ids[0] == tiny_tokenizer.bos_id
        assert all(ids[i : i + len(letters)] != letters for i in range(len(ids)))
        assert not any("eos" in tiny_tokenizer.piece(i) for i in ids[:-1])
    assert tokens[1].token_ids[-1] == tokens[2].token_ids[-1] == tiny_tokenizer.eos_id
