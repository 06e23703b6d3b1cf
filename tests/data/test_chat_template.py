"""Rendered conversations against golden strings, as each family's own template gives them."""

import pytest

from gemma_tune.data import Turn, template_for

USER, MODEL, SYSTEM = Turn("user", " Hi there \n"), Turn("model", "Hello!"), Turn("system", "Be brief.")
AGAIN, REPLY = Turn("user", "And?"), Turn("model", "\nFine. ")

GEMMA3 = {
    (USER,): "<bos><start_of_turn>user\nHi there<end_of_turn>\n",
    (USER, MODEL): "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n",
    (
        SYSTEM,
        USER,
        MODEL,
    ): "<bos><start_of_turn>user\nBe brief.\n\nHi there<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n",
    (
        USER,
        MODEL,
        AGAIN,
        REPLY,
    ): "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
    "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\nFine.<end_of_turn>\n",
}
GEMMA4 = {
    (USER, MODEL): "<bos><|turn>user\nHi there<turn|>\n<|turn>model\nHello!<turn|>\n",
    (
        SYSTEM,
        USER,
        MODEL,
    ): "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi there<turn|>\n<|turn>model\nHello!<turn|>\n",
}


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize(("turns", "text"), GEMMA3.items())
def test_gemma_1_to_3(family, turns, text):
    assert template_for(family).render(turns) == text


@pytest.mark.parametrize(("turns", "text"), GEMMA4.items())
def test_gemma_4(turns, text):
    assert template_for("gemma4").render(turns) == text


def test_generation_prompt():
    assert (
        template_for("gemma3")
        .render([USER], add_generation_prompt=True)
        .endswith("<end_of_turn>\n<start_of_turn>model\n")
    )
    assert template_for("gemma4").render([USER], add_generation_prompt=True).endswith("<turn|>\n<|turn>model\n")


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_exactly_what_the_model_says_is_learnt(family):
    template = template_for(family)
    spans = template.spans((SYSTEM, USER, MODEL, AGAIN, REPLY))
    learnt = [span.text for span in spans if span.is_target]
    assert learnt == ["Hello!" + template.end_of_turn, "Fine." + template.end_of_turn]


def test_a_document_is_learnt_whole():
    assert template_for("gemma3").render((Turn("text", "Once."),)) == "<bos>Once.<eos>"
    assert all(span.is_target for span in template_for("gemma3").spans((Turn("text", "Once."),)))
