"""The chat page's paths: its files, its settings, and the feedback that it sends."""

from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gemma_tune.data import Turn
from gemma_tune.serving.feedback import Exchange, FeedbackStore, RatedAnswer
from gemma_tune.serving.http.api_errors import ApiError
from gemma_tune.serving.http.page import Page
from gemma_tune.serving.http.schema.request_schema import FeedbackBody
from gemma_tune.serving.http.schema.response_schema import FeedbackStored, documented_responses
from gemma_tune.serving.http.served_models import Service


def page_routes(service: Service, store: FeedbackStore | None) -> APIRouter:
    """Returns the routes of the chat page.

    Args:
        service: Models that the page offers.
        store: Store for feedback; None: the page doesn't ask for any.
    """
    router, page = APIRouter(), Page()

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(http: HttpRequest) -> Response:
        return _found(page.response(http, "index.html"))

    @router.get("/page/{name}", include_in_schema=False)
    async def file(http: HttpRequest, name: str) -> Response:
        return _found(page.response(http, name))

    @router.get("/page-settings", include_in_schema=False)
    async def settings() -> Any:
        defaults = service.defaults
        return {
            "models": [service.describe(model) for model in service.models.values()],
            "defaults": {"max_tokens": defaults.max_new_tokens, **defaults.sampling._asdict()},
            "feedback": store is not None,
        }

    @router.post(
        "/feedback", response_model=FeedbackStored, responses=documented_responses(400, 401, 404, 408, 413, 415, 500)
    )
    def feedback(body: FeedbackBody) -> Any:  # Not a coroutine, since it waits for the disk.
        """Stores a user's feedback on answers."""
        if store is None:
            raise ApiError(
                404, "This server doesn't store feedback. Start it with --feedback_db=FILE.", code="no_feedback"
            )
        exchange = _exchange(body)
        store.write(exchange)
        return {"stored": exchange.has_feedback}

    return router


def _exchange(body: FeedbackBody) -> Exchange:
    return Exchange(
        id=body.id,
        turns=tuple(Turn("model" if turn.role == "assistant" else turn.role, turn.content) for turn in body.messages),
        answers=tuple(
            RatedAnswer(answer.model, answer.version, answer.text, answer.verdict or "", answer.correction or "")
            for answer in body.answers
        ),
        choice=body.choice,
        sampling=body.sampling,
    )


def _found(response: Response | None) -> Response:
    if response is None:
        raise HTTPException(404)
    return response
