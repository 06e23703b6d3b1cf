"""Requests over HTTP to a scripted engine, and what the engine is asked then."""

from gemma_tune.serving.engine.request import AnswerDelta

USER = [{"role": "user", "content": "Hello"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def answer_at_once(client, *pieces):
    """From now on every request of a client's engine gets these pieces."""
    submit = client.engine.submit

    def submit_and_answer(request, deliver):
        handle = submit(request, deliver)
        for piece in pieces or (AnswerDelta("Hi", (5,), finish_reason="stop"),):
            deliver(piece)
        return handle

    client.engine.submit = submit_and_answer
    return client


def asked_of(client, path=CHAT, **body):
    """The engine's requests that a body becomes."""
    answer_at_once(client)
    body = {"model": "m", **({"messages": USER} if path == CHAT else {"prompt": "Hello"}), **body}
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return [request for request, _, _ in client.engine.asked]


def events_of(reply):
    return [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line.startswith("data: ")]
