"""Tools and JSON as OpenAI's own client asks for them, on the real engine with a tiny model."""

import json

import openai
import pydantic
import pytest

pytestmark = pytest.mark.slow
MODEL = "tiny:gemma3"
USER = [{"role": "user", "content": "Where?"}]
FIND = {
    "type": "function",
    "function": {
        "name": "find",
        "parameters": {
            "type": "object",
            "properties": {"shelf": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["shelf"],
            "additionalProperties": False,
        },
    },
}


class Shelf(pydantic.BaseModel):
    """What is asked for."""

    number: int
    is_open: bool


@pytest.fixture(scope="module")
def client(listen):
    """A server with room for declared tools."""
    from rich.console import Console

    from gemma_tune.config import Config
    from gemma_tune.pipeline.serve import start_service
    from gemma_tune.serve_config import ServeConfig
    from gemma_tune.serving.http.app import make_app

    settings = ServeConfig(max_concurrent=1, max_tokens_in_flight=640, max_length=640)
    service = start_service(Config().replace({"model.source": MODEL}), settings, [], Console(quiet=True))
    with (
        listen(make_app(service, settings)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made
    service.engine.close()


def create(client, **rest):
    return client.chat.completions.create(model=MODEL, messages=USER, temperature=1.0, seed=1, max_tokens=120, **rest)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "find"}}])
def test_a_required_call_and_its_result(client, choice):
    reply = create(client, tools=[FIND], tool_choice=choice)
    message = reply.choices[0].message
    (call,) = message.tool_calls
    assert (reply.choices[0].finish_reason, message.content, call.function.name) == ("tool_calls", None, "find")
    assert 0 <= json.loads(call.function.arguments)["shelf"] <= 9
    result = {"role": "tool", "tool_call_id": call.id, "content": "Emma"}
    again = client.chat.completions.create(
        model=MODEL, messages=[*USER, message.model_dump(), result], max_tokens=2, temperature=0
    )
    assert again.choices[0].finish_reason in ("stop", "length")
    assert again.usage.prompt_tokens > 20


def test_a_streamed_call(client):
    whole = create(client, tools=[FIND], tool_choice="required").choices[0].message.tool_calls[0].function
    parts, reasons = [], []
    for chunk in create(client, tools=[FIND], tool_choice="required", stream=True):
        parts += chunk.choices[0].delta.tool_calls or []
        reasons.append(chunk.choices[0].finish_reason)
        assert not chunk.choices[0].delta.content
    assert "".join(part.function.arguments for part in parts) == whole.arguments
    assert parts[0].function.name == "find" and parts[0].index == 0 and reasons[-1] == "tool_calls"


def test_a_pydantic_model_is_parsed(client):
    reply = client.chat.completions.parse(
        model=MODEL, messages=USER, temperature=1.0, seed=3, max_tokens=200, response_format=Shelf
    )
    assert isinstance(reply.choices[0].message.parsed, Shelf)


def test_a_json_object(client):
    reply = create(client, response_format={"type": "json_object"})
    assert isinstance(json.loads(reply.choices[0].message.content), dict)


def test_a_bad_schema_is_a_bad_request(client):
    with pytest.raises(openai.BadRequestError, match="response_format"):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "cat"}}}
        create(client, response_format=form)


def test_penalties_change_answers(client):
    plain, penalized = create(client), create(client, frequency_penalty=2, presence_penalty=2)
    assert plain.choices[0].message.content != penalized.choices[0].message.content
