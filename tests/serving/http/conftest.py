"""A server in this process: on the real engine with a tiny model and an adapter, or on a scripted engine whose every
piece a test decides.
"""

import contextlib
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn

from gemma_tune.errors import EngineClosed, EngineFull
from gemma_tune.serve_config import ServeConfig

SHORT = {"max_concurrent": 4, "max_tokens_in_flight": 1024, "max_length": 160, "max_queued": 16}


@contextlib.contextmanager
def listening(app):
    """Runs an app behind uvicorn in a thread, and yields its URL."""
    from gemma_tune.serving.http.server import open_socket

    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    with open_socket("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory):
    """An adapter for the tiny model that changes its answers."""
    from gemma_tune.models import enable_lora, load_model, save_adapter
    from gemma_tune.models.layers import lora_layers

    model = load_model("tiny:gemma3")
    enable_lora(model.backbone, rank=2, alpha=2.0, target_layers=["all-linear"], seed=1)
    rng = np.random.default_rng(7)
    for layer in lora_layers(model.backbone):
        layer.lora_kernel_b.assign(rng.normal(size=layer.lora_kernel_b.shape) * 0.5)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="session")
def service(adapter_folder):
    """What `serve --model=tiny --adapter=tuned=…` serves."""
    from rich.console import Console

    from gemma_tune.config import Config
    from gemma_tune.pipeline.serve import start_service

    settings = {"model.source": "tiny:gemma3", "generation.max_new_tokens": 12}
    service = start_service(
        Config().replace(settings), ServeConfig(**SHORT), [f"tuned={adapter_folder}"], Console(quiet=True)
    )
    yield service
    service.engine.close()


@pytest.fixture(scope="session")
def url(service, tmp_path_factory):
    """Where it listens."""
    from gemma_tune.serving.feedback import FeedbackStore
    from gemma_tune.serving.http.app import make_app

    store = FeedbackStore(tmp_path_factory.mktemp("feedback") / "feedback.db")
    with listening(make_app(service, ServeConfig(), store=store)) as address:
        yield address


class ScriptedEngine:
    """An engine that does nothing by itself: a test sends the pieces.

    Attributes:
        asked: (request, deliver, handle) of all requests so far.
        room: How many requests may be under way at once.
    """

    def __init__(self):
        self.asked, self.room, self.is_open = [], 100, True

    def submit(self, request, deliver):
        if not self.is_open:
            raise EngineClosed("closed")
        if len(self.under_way) >= self.room:
            raise EngineFull("full")
        handle = SimpleNamespace(is_cancelled=False)
        handle.cancel = lambda: setattr(handle, "is_cancelled", True)
        self.asked.append((request, deliver, handle))
        return handle

    @property
    def under_way(self):
        return [handle for _, _, handle in self.asked if not handle.is_cancelled]

    @property
    def stats(self):
        return SimpleNamespace(running=len(self.under_way), queued=0, compilations_since_start=0)

    def drain(self, timeout_seconds):
        self.is_open = False
        return True

    def close(self):
        self.is_open = False


@pytest.fixture
def scripted():
    """`scripted(keys=["k"], max_body_bytes=2000)` returns a test client whose engine is `client.engine`."""
    from starlette.testclient import TestClient

    from gemma_tune.data import template_for
    from gemma_tune.models.load import load_tokenizer
    from gemma_tune.serving.http.app import make_app
    from gemma_tune.serving.http.served_models import RequestDefaults, ServedModel, Service
    from gemma_tune.serving.prompt_encoder import PromptEncoder
    from gemma_tune.serving.sampling import Sampling

    tokenizer, family = load_tokenizer("tiny")

    def make(keys=(), hosts=(), store=None, log=None, max_length=64, **settings):
        engine = ScriptedEngine()
        models = {"m": ServedModel("m", "", "", "v1"), "t": ServedModel("t", "t", "m", "v1+a")}
        encoder = PromptEncoder(tokenizer, template_for(family))
        service = Service(engine, models, encoder, max_length, RequestDefaults(8, Sampling(temperature=0.5)))
        app = make_app(service, ServeConfig(**settings), keys=keys, hosts=hosts, store=store, log=log)
        client = TestClient(app, raise_server_exceptions=False)
        client.engine, client.asgi = engine, app
        return client

    return make


@pytest.fixture(scope="session")
def listen():
    """`with listen(app) as url:`"""
    return listening
