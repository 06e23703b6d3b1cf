"""Writes the Modelfile from which Ollama imports a GGUF file (https://docs.ollama.com/modelfile)."""

from gemma_tune.data.chat_template import ChatTemplate

# A Go text/template that renders the conversation. A system text opens the first user turn, as in our own template.
_TEMPLATE = """{{- $system := .System }}
{{- range .Messages }}
{{- if eq .Role "user" }}START_OF_TURNuser
{{ if $system }}{{ $system }}

{{ $system = "" }}{{ end }}{{ .Content }}END_OF_TURN
{{ else if eq .Role "assistant" }}START_OF_TURNmodel
{{ .Content }}END_OF_TURN
{{ end }}
{{- end }}START_OF_TURNmodel
"""


def modelfile(gguf_name: str, template: ChatTemplate, context_length: int) -> str:
    """Returns the text of a Modelfile.

    Args:
        gguf_name: Name of the GGUF file, which is in the same folder.
        template: Chat template of the model's family.
        context_length: Most tokens of a conversation.
    """
    turns = _TEMPLATE.replace("START_OF_TURN", template.start_of_turn).replace("END_OF_TURN", template.end_of_turn)
    return (
        f"# ollama create NAME -f Modelfile && ollama run NAME\n"
        f"FROM ./{gguf_name}\n"
        f'TEMPLATE """{turns}"""\n'
        f'PARAMETER stop "{template.end_of_turn}"\n'
        f'PARAMETER stop "{template.start_of_turn}"\n'
        f"PARAMETER num_ctx {context_length}\n"
    )
