"""The server's ASGI application: OpenAI's API, health and metrics, and the chat page."""

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
from gemma_tune.serving.http.schema.request_schema import ChatRequest, CompletionRequest, GenerationRequest
from gemma_tune.serving.http.schema.response_schema import (
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
_CLIENT_CLOSED_REQUEST = 499  # nginx's status. Nobody receives it, but the metrics count it.
_GENERATION_RESPONSES = documented_responses(400, 401, 404, 408, 413, 415, 429, 500, 503, 504, events=True)


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
        service: Models and engine to serve.
        settings: Limits of requests.
        keys: API keys, one of which a request must send; empty: no key is needed.
        hosts: Allowed host names of the server; empty: any.
        store: Store for the page's feedback; None: the page doesn't ask for any.
        log: Function called with a line for each request.
    """
    metrics = Metrics(lambda: _gauges(service))
    app = FastAPI(title="gemma_tune", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(_openai_routes(service, settings, metrics), dependencies=[Depends(HTTPBearer(auto_error=False))])
    app.include_router(_operation_routes(service, metrics))
    app.include_router(page_routes(service, store))
    errors.install_error_handlers(app)
    _remove_unused_errors(app)
    app.add_middleware(
        AccessControl, keys=keys, open_paths=_OPEN_PATHS, hosts=hosts, max_body_bytes=settings.max_body_bytes
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(MetricsMiddleware, metrics=metrics, paths=_COUNTED_PATHS, log=log)
    return app


def _gauges(service: Service) -> tuple[float, float, float]:
    stats = service.engine.stats
    return stats.running, stats.queued, stats.compilations_since_start


def _openai_routes(service: Service, settings: ServeConfig, metrics: Metrics) -> APIRouter:
    router = APIRouter(prefix="/v1")

    async def reply(
        http: HttpRequest,
        body: GenerationRequest,
        kind: CompletionKind,
        num_top: int | None,
        make_requests: Callable[[Service, Any, int], list[Request]],
        tool_names: Sequence[str] = (),
    ) -> Response:
        # Tokenizing a long text takes a while, which must not block other requests.
        requests = await run_in_threadpool(make_requests, service, body, settings.max_answers)
        builder = ReplyBuilder(
            kind, service.model(body.model), requests, num_top, service.encoder.tokenizer, tool_names
        )
        answers = PendingAnswers(service.engine, requests, settings.request_timeout_seconds, metrics, body.model)
        if body.stream:
            options = body.stream_options
            return EventStream(builder.events(answers, bool(options and options.include_usage)), answers)
        try:
            return JSONResponse(await unless_disconnected(http, builder.whole(answers)))
        except ClientDisconnected:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        finally:
            answers.close()

    @router.post("/chat/completions", response_model=ChatReply, responses=_GENERATION_RESPONSES)
    async def chat_completions(http: HttpRequest, body: ChatRequest) -> Response:
        """Answers a conversation."""
        num_top = (body.top_logprobs or 0) if body.logprobs else None
        names = [tool.function.name for tool in body.offered_tools]
        return await reply(http, body, CHAT, num_top, chat_requests, names)

    @router.post("/completions", response_model=CompletionReply, responses=_GENERATION_RESPONSES)
    async def completions(http: HttpRequest, body: CompletionRequest) -> Response:
        """Continues a text."""
        return await reply(http, body, TEXT, body.logprobs, completion_requests)

    @router.get("/models", response_model=ModelList, responses=documented_responses(401))
    async def models() -> Any:
        """Lists the models that requests can name."""
        return {"object": "list", "data": [service.describe(model) for model in service.models.values()]}

    @router.get("/models/{name:path}", response_model=ModelReply, responses=documented_responses(401, 404))
    async def model(name: str) -> Any:
        """Describes a model that requests can name."""
        return service.describe(service.model(name))

    return router


def _operation_routes(service: Service, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health", response_model=HealthReply, responses=documented_responses(503))
    async def health() -> Any:
        """Says whether the server takes requests."""
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
        """Returns the server's metrics in Prometheus's text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _remove_unused_errors(app: FastAPI) -> None:
    """Removes status 422, which this server doesn't use, from the OpenAPI document."""
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
