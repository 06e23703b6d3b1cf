"""Writes the chat templates of data/chat_template.py in Jinja, for programs that render conversations themselves.

In these, the role `assistant` means `model`, as in most programs, and a turn's content may be a text or a list of parts
of type `text`.
"""

from gemma_tune.data.chat_template import ChatTemplate

_CONTENT = """\
{%- macro text_of(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content if part['type'] == 'text' -%}
      {{- part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""
_BODY = """\
{{- bos_token -}}
{%- set kept = namespace(system='') -%}
{%- for message in messages -%}
  {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
  {%- if role not in ['system', 'user', 'model'] -%}
    {{- raise_exception("A turn's role is system, user or assistant, not " + role + ".") -}}
  {%- endif -%}
SYSTEM
    {{- 'START' + SPELLED + '\\n' + (kept.system if role == 'user' else '') + text_of(message['content']) | trim
        + 'END\\n' -}}
    {%- if role == 'user' -%}
      {%- set kept.system = '' -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- 'STARTmodel\\n' -}}
{%- endif -%}
"""
_KEPT = """\
  {%- if role == 'system' -%}
    {%- set kept.system = text_of(message['content']) + '\\n\\n' -%}
  {%- else -%}"""
_OWN_TURN = "  {%- if true -%}"


def jinja_template(template: ChatTemplate) -> str:
    """Returns a Jinja template that renders conversations as `template.render` does."""
    renamed = f"('{template.system_role}' if role == 'system' else role)"
    body = _BODY.replace("SYSTEM", _OWN_TURN if template.system_has_turn else _KEPT)
    body = body.replace("SPELLED", "role" if template.system_role == "system" else renamed)
    return _CONTENT + body.replace("START", template.start_of_turn).replace("END", template.end_of_turn)
