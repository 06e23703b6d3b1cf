"""Tools and thoughts against golden strings, which the families' own templates gave for the same conversation.

They were rendered with Google's canonical Gemma 4 template of 2026-07-09 and with FunctionGemma's, as the package trl
1.16 and its repository hold them (trl/chat_templates/gemma4_v5.jinja and functiongemma.jinja).
"""

import json

import pytest

from gemma_tune.data import Turn, template_for
from gemma_tune.data.chat_template import all_control_tokens
from gemma_tune.data.example import Row
from gemma_tune.data.sources.row_formats import to_examples
from gemma_tune.data.tool_markup import FUNCTION_GEMMA_TOOLS, GEMMA4_TOOLS


class FunctionGemmaTokenizer:
    """Knows FunctionGemma's tokens, as nothing else of it matters here."""

    def encode(self, text):
        return [1] if text == "<start_function_call>" else [2] * len(text)


TEMPLATES = {
    "gemma3": template_for("gemma3"),
    "gemma4": template_for("gemma4"),
    "functiongemma": template_for("gemma3", FunctionGemmaTokenizer()),
}
PROPERTIES = {
    "title": {"type": "string", "description": "Its title"},
    "Kind": {"type": "string", "description": "Kind", "enum": ["book", "map"]},
    "shelves": {"type": "array", "description": "Where", "items": {"type": "string"}},
    "size": {
        "type": "object",
        "description": "Size",
        "properties": {"width": {"type": "number", "description": "In cm"}},
        "required": ["width"],
    },
}
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": ["title"]}
ARGUMENTS = {
    "title": 'blue "atlas"', "copies": 2, "exact": True, "min": 0.5, "shelves": ["G 12"], "size": {"b": 1, "A": "x"},
}  # fmt: skip
CHAT = {
    "tools": [
        {"type": "function", "function": {"name": "find_item", "description": "Finds an item.", "parameters": SCHEMA}}
    ],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it there?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "find_item", "arguments": json.dumps(ARGUMENTS)}},
                {"id": "c2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "G 12"},
        {"role": "tool", "tool_call_id": "c2", "content": "nine"},
        {"role": "assistant", "content": "On G 12."},
    ],
}
THOUGHTFUL = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo.", "reasoning_content": "Earlier."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So.", "reasoning_content": "Hm."},
    ]
}
# fmt: off
GOLDEN = {
    "gemma4": '<bos><|turn>system\nBe brief.<|tool>declaration:find_item{description:<|"|>Finds an item.<|"|>,parameters:{properties:{Kind:{description:<|"|>Kind<|"|>,enum:[<|"|>book<|"|>,<|"|>map<|"|>],type:<|"|>STRING<|"|>},shelves:{description:<|"|>Where<|"|>,items:{type:<|"|>STRING<|"|>},type:<|"|>ARRAY<|"|>},size:{description:<|"|>Size<|"|>,properties:{width:{description:<|"|>In cm<|"|>,type:<|"|>NUMBER<|"|>}},required:[<|"|>width<|"|>],type:<|"|>OBJECT<|"|>},title:{description:<|"|>Its title<|"|>,type:<|"|>STRING<|"|>}},required:[<|"|>title<|"|>],type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n<|turn>user\nIs it there?<turn|>\n<|turn>model\n<|tool_call>call:find_item{copies:2,exact:true,min:0.5,shelves:[<|"|>G 12<|"|>],size:{A:<|"|>x<|"|>,b:1},title:<|"|>blue "atlas"<|"|>}<tool_call|><|tool_call>call:now{}<tool_call|><|tool_response>response:find_item{value:<|"|>G 12<|"|>}<tool_response|><|tool_response>response:now{value:<|"|>nine<|"|>}<tool_response|>On G 12.<turn|>\n',
    "functiongemma": '<bos><start_of_turn>developer\nBe brief.<start_function_declaration>declaration:find_item{description:<escape>Finds an item.<escape>,parameters:{properties:{Kind:{description:<escape>Kind<escape>,enum:[<escape>book<escape>,<escape>map<escape>],type:<escape>STRING<escape>},shelves:{description:<escape>Where<escape>,items:{type:<escape>STRING<escape>},type:<escape>ARRAY<escape>},size:{description:<escape>Size<escape>,properties:{width:{description:<escape>In cm<escape>,type:<escape>NUMBER<escape>}},required:[<escape>width<escape>],type:<escape>OBJECT<escape>},title:{description:<escape>Its title<escape>,type:<escape>STRING<escape>}},required:[<escape>title<escape>],type:<escape>OBJECT<escape>}}<end_function_declaration><end_of_turn>\n<start_of_turn>user\nIs it there?<end_of_turn>\n<start_of_turn>model\n<start_function_call>call:find_item{copies:2,exact:true,min:0.5,shelves:[<escape>G 12<escape>],size:{A:<escape>x<escape>,b:1},title:<escape>blue "atlas"<escape>}<end_function_call><start_function_call>call:now{}<end_function_call><start_function_response>response:find_item{value:<escape>G 12<escape>}<end_function_response><start_function_response>response:now{value:<escape>nine<escape>}<end_function_response>On G 12.<end_of_turn>\n',
}
GOLDEN_THOUGHTS = "<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\nYo.<turn|>\n<|turn>user\nWhy?<turn|>\n<|turn>model\n<|channel>thought\nHm.\n<channel|>So.<turn|>\n"
# fmt: on


def turns_of(row):
    (example,) = to_examples([Row(row, "a:1")], pytest.fail)
    return example.turns


@pytest.mark.parametrize("name", GOLDEN)
def test_tools_as_the_family_renders_them(name):
    assert TEMPLATES[name].render(turns_of(CHAT)) == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_model_learns_its_calls_and_to_wait_but_no_results(name):
    template, tools = TEMPLATES[name], TEMPLATES[name].tools
    learnt = [span.text for span in template.spans(turns_of(CHAT)) if span.is_target]
    calls = GOLDEN[name].split("model\n")[1].split(tools.response[0])[0]
    assert learnt == [calls + tools.response[0], "On G 12." + template.end_of_turn]
    asked = turns_of(CHAT)[:-1]
    assert template.render(asked, add_generation_prompt=True) == GOLDEN[name].split("On G 12.")[0]  # The turn goes on.


def test_thoughts_as_gemma4_renders_them():
    turns = turns_of(THOUGHTFUL)
    template = TEMPLATES["gemma4"]
    assert template.render(turns) == GOLDEN_THOUGHTS
    assert [span.text for span in template.spans(turns) if span.is_target] == [
        "Yo.<turn|>",
        "<|channel>thought\nHm.\n<channel|>So.<turn|>",
    ]
    masked = [turn._replace(is_learnt=turn.role != "thought") for turn in turns]
    assert template.render(masked) == GOLDEN_THOUGHTS
    assert [span.text for span in template.spans(masked) if span.is_target] == ["Yo.<turn|>", "So.<turn|>"]


def test_gemma3_has_a_text_form():
    turns = turns_of(CHAT)
    template = TEMPLATES["gemma3"]
    learnt = [span.text for span in template.spans(turns) if span.is_target]
    call = f'<tool_call>\n{{"name": "find_item", "arguments": {json.dumps(ARGUMENTS)}}}\n</tool_call>'
    other = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert learnt == [f"{call}\n{other}<end_of_turn>", "On G 12.<end_of_turn>"]
    text = template.render(turns)
    results = '<tool_response>\n{"name": "find_item", "content": "G 12"}\n</tool_response>\n\n<tool_response>\n{"name": "now", "content": "nine"}\n</tool_response>'
    assert f"<end_of_turn>\n<start_of_turn>user\n{results}<end_of_turn>\n<start_of_turn>model\n" in text
    assert text.startswith("<bos><start_of_turn>user\nBe brief.\n\nYou may call functions.")
    assert json.dumps(CHAT["tools"][0]["function"]) + "\n\nIs it there?<end_of_turn>\n" in text
    assert "<think>\nHm.\n</think>\n\nSo.<end_of_turn>" in template.render(turns_of(THOUGHTFUL))


def test_metrics_read_a_call_as_it_is_learnt():
    from gemma_tune.evaluation.metrics.tool_calls import parse_tool_calls

    (example,) = to_examples([Row({**CHAT, "messages": CHAT["messages"][:3]}, "a:1")], pytest.fail)
    assert [turn.role for turn in example.prompt] == ["system", "tools", "user"]
    for text in (example.answer, *(TEMPLATES[name].render(example.turns) for name in ("gemma3", "functiongemma"))):
        read = parse_tool_calls(text.split("model\n")[-1])
        assert [(each.name, each.arguments) for each in read] == [("find_item", ARGUMENTS), ("now", {})]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_text_goes_to_the_first_question_though_the_model_speaks_first(name):
    turns = [Turn("system", "S"), Turn("model", "M", False), Turn("user", "U"), Turn("model", "A")]
    text = TEMPLATES[name].render(turns)
    end = TEMPLATES[name].end_of_turn
    assert f"model\nM{end}\n" in text and text.count("S") == 1
    assert [span.text for span in TEMPLATES[name].spans(turns) if span.is_target] == [f"A{end}"]
    assert ("user\nS\n\nU" in text) == (name == "gemma3")


@pytest.mark.parametrize("tools", [GEMMA4_TOOLS, FUNCTION_GEMMA_TOOLS])
def test_a_value_can_end_no_string(tools):
    """A quote token in a value is a quotation mark there, so that the number of quote tokens stays even."""
    text = tools.call("f", {"a": f"x{tools.quote},b:{tools.quote}y", f"k{tools.quote}": [tools.quote]})
    assert text.count(tools.quote) == 4
    assert tools.result("f", tools.quote).count(tools.quote) == 2


def test_the_control_tokens_of_all_families_are_known():
    for name, text in GOLDEN.items():
        for token in TEMPLATES[name].control_tokens:
            assert token in all_control_tokens()
        bare = text
        for token in (*all_control_tokens(), TEMPLATES[name].tools.quote):
            bare = bare.replace(token, "")
        assert "<" not in bare and "|" not in bare
