"""The server's paths."""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from gemma_tune.serve_config import ServeConfig
from gemma_tune.serving.engine.request import Request
from gemma_tune.serving.feedback import FeedbackStore
from gemma_tune.serving.http import api_errors as errors
from gemma_tune.serving.http.access_control import AccessControl
from gemma_tune.serving.http.engine_requests import chat_requests, completion_requests
from gemma_tune.serving.http.page_routes import page_routes
from gemma_tune.serving.http.pending_answers import ClientDisconnected, PendingAnswers, unless_disconnected
from gemma_tune.serving.http.prometheus import Metrics, MetricsMiddleware
from gemma_tune.serving.http.reply_builder import CHAT, TEXT, CompletionKind, ReplyBuilder
from gemma_tune.serving.http.request_schema import ChatRequest, CompletionRequest, GenerationRequest
from gemma_tune.serving.http.response_schema import (
    ChatReply,
    CompletionReply,
    HealthReply,
    ModelList,
    ModelReply,
    documented_responses,
)
from gemma_tune.serving.http.served_models import Service
from gemma_tune.serving.http.streaming import EventStream
from gemma_tune.version import __version__

_OPEN_PATHS = frozenset({"/", "/page/", "/health", "/openapi.json", "/favicon.ico"})
_COUNTED_PATHS = frozenset(
    {"/", "/health", "/metrics", "/feedback", "/page-settings", "/v1/chat/completions", "/v1/completions", "/v1/models"}
)
_CLIENT_LEFT = 499  # As nginx calls it. Nobody receives it; it is counted.
_ANSWERING = documented_responses(400, 401, 404, 408, 413, 415, 429, 500, 503, 504, events=True)


def make_app(
    service: Service,
    settings: ServeConfig,
    *,
    keys: Sequence[str] = (),
    hosts: Sequence[str] = (),
    store: FeedbackStore | None = None,
    log: Callable[[str], None] | None = None,
) -> FastAPI:
    """Returns the server's ASGI application.

    Args:
        service: What it serves.
        settings: Its limits.
        keys: Of which a request must bring one; empty: none is needed.
        hosts: Names by which it may be addressed; empty: any.
        store: Where the page's feedback goes; None: nowhere.
        log: Called with a line for each request.
    """
    metrics = Metrics(lambda: _now(service))
    app = FastAPI(title="gemma_tune", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(_openai_routes(service, settings, metrics), dependencies=[Depends(HTTPBearer(auto_error=False))])
    app.include_router(_operation_routes(service, metrics))
    app.include_router(page_routes(service, store))
    errors.install_error_handlers(app)
    _describe_errors_as_they_are(app)
    app.add_middleware(
        AccessControl, keys=keys, open_paths=_OPEN_PATHS, hosts=hosts, max_body_bytes=settings.max_body_bytes
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(MetricsMiddleware, metrics=metrics, paths=_COUNTED_PATHS, log=log)
    return app


def _now(service: Service) -> tuple[float, float, float]:
    stats = service.engine.stats
    return stats.running, stats.queued, stats.compilations_since_start


def _openai_routes(service: Service, settings: ServeConfig, metrics: Metrics) -> APIRouter:
    router = APIRouter(prefix="/v1")

    async def reply(
        http: HttpRequest,
        asked: GenerationRequest,
        kind: CompletionKind,
        num_top: int | None,
        make_requests: Callable[[Service, Any, int], list[Request]],
    ) -> Response:
        # Tokenizing a long text takes a while, in which others are to be answered.
        requests = await run_in_threadpool(make_requests, service, asked, settings.max_answers)
        made = ReplyBuilder(kind, service.model(asked.model), requests, num_top, service.tokenizer)
        answers = PendingAnswers(service.engine, requests, settings.request_timeout_seconds, metrics, asked.model)
        if asked.stream:
            options = asked.stream_options
            return EventStream(made.events(answers, bool(options and options.include_usage)), answers)
        try:
            return JSONResponse(await unless_disconnected(http, made.whole(answers)))
        except ClientDisconnected:
            return Response(status_code=_CLIENT_LEFT)
        finally:
            answers.close()

    @router.post("/chat/completions", response_model=ChatReply, responses=_ANSWERING)
    async def chat_completions(http: HttpRequest, asked: ChatRequest) -> Response:
        """Answers a conversation."""
        num_top = (asked.top_logprobs or 0) if asked.logprobs else None
        return await reply(http, asked, CHAT, num_top, chat_requests)

    @router.post("/completions", response_model=CompletionReply, responses=_ANSWERING)
    async def completions(http: HttpRequest, asked: CompletionRequest) -> Response:
        """Goes on with a text."""
        return await reply(http, asked, TEXT, asked.logprobs, completion_requests)

    @router.get("/models", response_model=ModelList, responses=documented_responses(401))
    async def models() -> Any:
        """Lists the models that requests can name."""
        return {"object": "list", "data": [service.describe(model) for model in service.models.values()]}

    @router.get("/models/{name:path}", response_model=ModelReply, responses=documented_responses(401, 404))
    async def model(name: str) -> Any:
        """Returns one of them."""
        return service.describe(service.model(name))

    return router


def _operation_routes(service: Service, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health", response_model=HealthReply, responses=documented_responses(503))
    async def health() -> Any:
        """Says whether requests are taken."""
        stats = service.engine.stats
        if not service.engine.is_open:
            raise errors.shutting_down()
        return {
            "status": "ok",
            "models": list(service.models),
            "running": stats.running,
            "queued": stats.queued,
        }

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **documented_responses(401)},
    )
    async def prometheus() -> Response:
        """Returns the server's counts, as Prometheus reads them."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _describe_errors_as_they_are(app: FastAPI) -> None:
    """Takes 422, which isn't used here, out of the OpenAPI document."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
