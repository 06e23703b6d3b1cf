"""Recognizes chat templates that were applied to a text before: Gemma's own become turns again.

Rendered a second time, their control tokens would stand in the text twice, and the questions would be learnt too.
"""

import re

from gemma_tune.data.example import Turn

_GEMMA_TURN = re.compile(
    r"\s*(?:<start_of_turn>|<\|turn>)(user|model|system|developer)(?:\n|\Z)(.*?)(<end_of_turn>|<turn\|>|\Z)", re.DOTALL
)
_BOS, _EOS = "<bos>", "<eos>"
_AT_END = re.compile(
    r"(?:\s*(?:<end_of_turn>|<turn\|>|<eos>|<pad>|<\|im_end\|>|<\|eot_id\|>|<\|endoftext\|>|</s>))+\s*\Z"
)
_ROLES = {"developer": "system"}
# Templates of other families, by what their texts hold.
_OTHERS = {
    "### Instruction/Response": re.compile(r"^#{2,3} ?(?:Response|Answer|Assistant|Output):", re.MULTILINE),
    "ChatML": re.compile(r"<\|im_start\|>"),
    "Llama's [INST]": re.compile(r"\[INST\].*\[/INST\]", re.DOTALL),
    "Llama 3's headers": re.compile(r"<\|start_header_id\|>"),
    "Human/Assistant": re.compile(r"^(?:Human|User): .*^(?:Assistant|AI): ", re.DOTALL | re.MULTILINE),
}
_TOOL_TOKENS = ("<start_function_", "<|tool")


def parse_gemma_text(text: str) -> list[Turn] | None:
    """Returns the turns of a text that Gemma's chat template made, or None where it isn't such a text as a whole.

    The last turn may be the model's, open and empty, as a prompt has it; it isn't returned.
    """
    if "<start_of_turn>" not in text and "<|turn>" not in text:
        return None
    text = text.strip().removeprefix(_BOS).removesuffix(_EOS)
    turns, end = [], 0
    while found := _GEMMA_TURN.match(text, end):
        role, content, closing = found.groups()
        if not closing and role == "model" and not content.strip():
            end = found.end()
            break
        turns.append(Turn(_ROLES.get(role, role), content.strip()))
        end = found.end()
        if not closing:
            break
    is_whole = bool(turns) and not text[end:].strip()
    if not is_whole or any(token in turn.content for turn in turns for token in (*_TOOL_TOKENS, "<start_of_turn>")):
        return None
    return turns


def without_end_tokens(text: str, changes: list[str]) -> str:
    """Returns a text without `<bos>` at its beginning and control tokens at its end, of Gemma or of other families.

    Args:
        text: The text.
        changes: List that gets `end_tokens_removed` if there were any.
    """
    if "<" not in text:
        return text
    kept = text
    if kept.lstrip().startswith(_BOS):
        kept = kept.lstrip().removeprefix(_BOS)
    found = _AT_END.search(kept) if kept.rstrip().endswith(">") else None
    if found and ("</s>" not in found[0] or "<s>" not in kept):  # Otherwise it is HTML.
        kept = kept[: found.start()]
    if kept != text:
        changes.append("end_tokens_removed")
    return kept


def other_template(text: str) -> str:
    """Returns the name of the chat template of another family that a text was made with; '' if there is none."""
    # Most texts have none of these, one of which is in each template.
    if not ("##" in text or "<|" in text or "[INST]" in text or "\nAssistant:" in text or "\nAI:" in text):
        return ""
    return next((name for name, pattern in _OTHERS.items() if pattern.search(text)), "")
