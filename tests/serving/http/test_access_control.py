"""Keys, names, lengths: what keeps a request out before anything reads it."""

import hashlib
import hmac
import json

import pytest

from gemma_tune.errors import ConfigError
from gemma_tune.serving.http.access_control import read_keys

USER = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/page-settings", "/v1/nothing"])
def test_without_a_key_nothing_is_told(scripted, path):
    client = scripted(keys=["first", "sécond"])
    for headers in ({}, bearer("wrong"), bearer(""), {"authorization": "first"}, {"authorization": "Basic first"}):
        reply = client.get(path, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
    for key in ("first", "sécond".encode()):
        headers = {"authorization": b"Bearer " + key} if isinstance(key, bytes) else bearer(key)
        assert client.get(path, headers=headers).status_code in (200, 404)


def test_the_page_and_health_need_no_key(scripted):
    client = scripted(keys=["k"])
    for path in ("/", "/page/chat.js", "/health", "/openapi.json"):
        assert client.get(path).status_code == 200, path
    for path in ("/page", "/pages/chat.js", "//v1/models", "/health/"):
        assert client.get(path).status_code in (401, 404), path


def test_a_body_without_a_key_is_not_even_read(scripted):
    client = scripted(keys=["k"])
    reply = client.post(CHAT, content=b"{not json", headers={"content-type": "application/json"})
    assert reply.status_code == 401


def test_keys_are_compared_whole_all_of_them_and_in_constant_time(scripted, monkeypatch):
    compared = []
    whole = hmac.compare_digest

    def watched(one, other):
        compared.append((one, other))
        return whole(one, other)

    client = scripted(keys=["first", "second", "third"])
    monkeypatch.setattr("gemma_tune.serving.http.access_control.hmac.compare_digest", watched)
    for key in ("first", "third", "wrong", "f"):
        compared.clear()
        client.get("/v1/models", headers=bearer(key))
        assert len(compared) == 3  # No early end that time would tell of.
        assert {len(each) for pair in compared for each in pair} == {hashlib.sha256().digest_size}


def test_a_file_of_keys(write):
    assert read_keys(write("keys.txt", "# of the shop\nabc\n\n  d#f  \r\n")) == ("abc", "d#f")
    for content in ("", "\n# none\n"):
        with pytest.raises(ConfigError, match="contains no key"):
            read_keys(write("empty.txt", content))
    with pytest.raises(ConfigError, match="can't be read"):
        read_keys(write("binary.txt", b"\xff\xfe"))
    with pytest.raises(ConfigError, match="can't be read"):
        read_keys("/nowhere/keys.txt")


def test_a_page_that_has_its_own_name_lead_here_is_kept_out(scripted):
    """DNS rebinding: the browser asks this machine and names the attacker's host."""
    client = scripted(hosts=("localhost", "127.0.0.1", "[::1]"))
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert client.get("/health", headers={"host": host}).status_code == 200, host
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
        reply = client.get("/health", headers={"host": host})
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "host_not_allowed"), host


def test_pages_of_other_servers_may_not_ask_unless_they_are_named(scripted):
    origin = {"origin": "https://shop.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in scripted().options(CHAT, headers=origin).headers
    client = scripted(cors_origins=("https://shop.example",), keys=["k"])
    allowed = client.options(CHAT, headers={**origin, "access-control-request-headers": "authorization"})
    assert allowed.headers["access-control-allow-origin"] == "https://shop.example"
    other = client.options(CHAT, headers={**origin, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_body_that_is_too_long_is_413_whether_or_not_it_says_so(scripted):
    client = scripted(max_body_bytes=2000)
    body = json.dumps({"model": "m", "messages": USER, "user": "x" * 3000}).encode()
    headers = {"content-type": "application/json"}
    said = client.post(CHAT, content=body, headers=headers)
    unsaid = client.post(CHAT, content=(body[i : i + 500] for i in range(0, len(body), 500)), headers=headers)
    for reply in (said, unsaid):
        assert reply.status_code == 413, reply.text
        assert reply.json()["error"]["code"] == "body_too_large"
        assert reply.headers["connection"] == "close"
    assert client.post("/feedback", content=body, headers=headers).status_code == 413
    assert not client.engine.asked


def test_a_client_that_sends_much_too_much_still_sees_why_it_is_refused(scripted, listen):
    """Over a real connection, where closing it while the client sends would lose the reply."""
    import httpx2

    body, headers = b"x" * 5_000_000, {"content-type": "application/json"}
    for status, client in ((413, scripted()), (401, scripted(keys=["k"]))):
        with listen(client.asgi) as url:
            for _ in range(5):
                assert httpx2.post(f"{url}{CHAT}", content=body, headers=headers).status_code == status
                pieces = (body[i : i + 100_000] for i in range(0, len(body), 100_000))
                assert httpx2.post(f"{url}{CHAT}", content=pieces, headers=headers).status_code == status


def test_a_body_that_does_not_come_is_408(scripted, listen, monkeypatch):
    import socket

    monkeypatch.setattr("gemma_tune.serving.http.access_control.BODY_TIMEOUT_SECONDS", 0.2)
    with listen(scripted().asgi) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as slow:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
            slow.sendall(head.encode() + b'{"mod')
            assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")
