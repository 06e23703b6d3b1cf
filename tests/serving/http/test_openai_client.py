"""The server as OpenAI's own client sees it, on the real engine with a tiny model and an adapter on it."""

import asyncio

import openai
import pytest

import gemma_tune
from gemma_tune.models.load import load_model

QUESTION = "How do I reset it?"
USER = [{"role": "user", "content": QUESTION}]
BASE, TUNED = "tiny:gemma3", "tuned"


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def wanted(adapter_folder):
    """The answers that `gemma_tune.generate` gives, of the base and with the adapter merged into it."""
    answers = {}
    for name, adapter in ((BASE, ""), (TUNED, str(adapter_folder))):
        model = load_model("tiny:gemma3", adapter=adapter)
        answers[name] = gemma_tune.generate(model, QUESTION, max_new_tokens=12)
    assert answers[BASE] != answers[TUNED]
    return answers


def test_models_are_listed_the_tuned_one_first(client):
    models = client.models.list().data
    assert [model.id for model in models] == [TUNED, BASE]
    assert client.models.retrieve(TUNED).parent == BASE
    assert models[0].version.startswith(models[1].version + "+")
    with pytest.raises(openai.NotFoundError, match="Did you mean tuned"):
        client.models.retrieve("tunned")


@pytest.mark.parametrize("name", [BASE, TUNED])
def test_a_chat_is_answered_as_generate_does(client, wanted, name):
    reply = client.chat.completions.create(model=name, messages=USER, temperature=0)
    assert reply.choices[0].message.content.strip() == wanted[name]
    assert (reply.choices[0].message.role, reply.choices[0].finish_reason) == ("assistant", "length")
    assert reply.usage.completion_tokens == 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12
    assert reply.system_fingerprint == client.models.retrieve(name).version


@pytest.mark.parametrize("name", [BASE, TUNED])
def test_a_stream_says_the_same(client, wanted, name):
    text, usages, finish = "", [], []
    stream = client.chat.completions.create(
        model=name, messages=USER, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usages += [chunk.usage] if chunk.usage else []
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        finish += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
    assert text.strip() == wanted[name]
    assert (finish, [usage.completion_tokens for usage in usages]) == (["length"], [12])


def test_many_at_once_are_answered_as_each_alone(url, wanted):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            asked = [
                client.chat.completions.create(model=name, messages=USER, temperature=0) for name in [BASE, TUNED] * 8
            ]
            return [reply.choices[0].message.content.strip() for reply in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [wanted[BASE], wanted[TUNED]] * 8


def test_an_asynchronous_stream(url, wanted):
    async def read():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(model=TUNED, messages=USER, temperature=0, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(read()).strip() == wanted[TUNED]


def test_a_seed_makes_an_answer_again_and_n_answers_differ(client):
    def ask(**more):
        reply = client.chat.completions.create(model=BASE, messages=USER, temperature=1.5, **more)
        return [choice.message.content for choice in reply.choices]

    first = ask(seed=7, n=3)
    assert first == ask(seed=7, n=3)
    assert len(set(first)) == 3
    assert ask(seed=8)[0] == first[1]  # The answers of a request have one seed after the other.
    assert ask() != ask()


def test_stop_strings_end_an_answer_before_them(client):
    whole = client.completions.create(model=BASE, prompt="Hello", max_tokens=12, temperature=0).choices[0]
    stop = whole.text[4:7]
    ended = client.completions.create(model=BASE, prompt="Hello", max_tokens=12, temperature=0, stop=[stop, "§"])
    assert ended.choices[0].text == whole.text[: whole.text.find(stop)]
    assert (whole.finish_reason, ended.choices[0].finish_reason) == ("length", "stop")


def test_completions_of_several_prompts_in_their_order(client):
    prompts = ["Hello", "The phone", "A"]
    together = client.completions.create(model=TUNED, prompt=prompts, max_tokens=5, temperature=0)
    alone = [
        client.completions.create(model=TUNED, prompt=prompt, max_tokens=5, temperature=0).choices[0].text
        for prompt in prompts
    ]
    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1, 2]


def test_log_probabilities_are_the_model_s(client, service):
    """The same as from one forward pass through the model, on the prompt with the answer behind it."""
    import jax
    import numpy as np

    from gemma_tune.serving.engine.request import Request

    reply = client.chat.completions.create(
        model=BASE, messages=USER, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    model = load_model("tiny:gemma3")
    prompt = service.encoder.encode(QUESTION)
    made = [token for delta in service.engine.stream(Request(tuple(prompt), 4)) for token in delta.token_ids]
    ids = np.array([[*prompt, *made[:-1]]])
    logits = model({"token_ids": ids, "padding_mask": np.ones_like(ids)})[0, -4:]
    logprobs = np.asarray(jax.nn.log_softmax(np.asarray(logits, np.float32)))
    content = reply.choices[0].logprobs.content
    assert [entry.token for entry in content] == [service.encoder.tokenizer.decode([token]) for token in made]
    for entry, token, row in zip(content, made, logprobs, strict=True):
        # float32 through two programs that add in different orders.
        assert entry.logprob == pytest.approx(float(row[token]), abs=2e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(np.sort(row)[:-4:-1].tolist(), abs=2e-4)
        assert entry.token == entry.top_logprobs[0].token
    texts = client.completions.create(model=BASE, prompt="Hi", max_tokens=3, temperature=0, logprobs=2).choices[0]
    assert "".join(texts.logprobs.tokens) == texts.text
    assert texts.logprobs.text_offset == [0, len(texts.logprobs.tokens[0]), len("".join(texts.logprobs.tokens[:2]))]


def test_errors_are_the_client_s_own(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4o", messages=USER)
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="together may have at most 160"):
        client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "word " * 200}])
    with pytest.raises(openai.BadRequestError, match="reasoning_effort: is not supported by this server"):
        client.chat.completions.create(model=BASE, messages=USER, reasoning_effort="high")
    with pytest.raises(openai.BadRequestError, match="only text"):
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
        client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": [image]}])


def test_a_reply_can_be_sent_back_as_it_came(client):
    """Conversations are written so: the client's own message goes on the list."""
    reply = client.chat.completions.create(model=BASE, messages=USER, max_tokens=3)
    messages = [*USER, reply.choices[0].message, {"role": "user", "content": "Again"}]
    assert client.chat.completions.create(model=BASE, messages=messages, max_tokens=3).usage.prompt_tokens > 3


def test_a_full_queue_is_a_rate_limit_and_a_retry_gets_through(url, client, wanted):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as impatient:
        streams = [
            client.chat.completions.create(model=BASE, messages=USER, max_tokens=120, n=5, stream=True)
            for _ in range(4)
        ]  # 20 answers: 4 are written, 16 wait.
        with pytest.raises(openai.RateLimitError):
            impatient.chat.completions.create(model=BASE, messages=USER, n=8)
        for stream in streams:
            stream.close()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5) as patient:
        reply = patient.chat.completions.create(model=TUNED, messages=USER, temperature=0)
    assert reply.choices[0].message.content.strip() == wanted[TUNED]


def test_clients_that_leave_free_their_places(service, client):
    import time

    for stream in [
        client.chat.completions.create(model=BASE, messages=USER, max_tokens=120, stream=True) for _ in range(6)
    ]:
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 5
    while (stats := service.engine.stats).running + stats.queued and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (stats.running, stats.queued, stats.cache_positions_in_use) == (0, 0, 0)
    assert stats.finish_reasons["cancelled"] >= 1


def test_what_the_server_prints_of_itself_works(url, wanted, capfd):
    """The lines for curl and Python, as they are printed when it starts, give the answer."""
    import json
    import shutil
    import subprocess

    from gemma_tune.cli.output import Output
    from gemma_tune.cli.server_address import announce, server_address

    announce(server_address("127.0.0.1", int(url.rsplit(":", 1)[1]), [TUNED, BASE], False), Output(False))
    lines = dict(line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines() if line.startswith("  "))
    reply = eval(lines["Python"].replace("…", json.dumps(USER[0])), {"openai": openai})
    assert reply.choices[0].message.content.strip() == wanted[TUNED]
    if shutil.which("curl"):
        done = subprocess.run(["bash", "-c", lines["curl"]], capture_output=True, text=True)
        assert json.loads(done.stdout)["choices"][0]["message"]["content"], done.stderr
