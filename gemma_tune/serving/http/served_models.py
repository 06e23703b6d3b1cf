"""What is served: an engine, the models that its adapters make of it, and what a request gets that doesn't say."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from gemma_tune.data.chat_template import ChatTemplate
from gemma_tune.errors import did_you_mean
from gemma_tune.models.sources.tokenizer import TextTokenizer
from gemma_tune.serving.engine.request import AnswerDelta, Request
from gemma_tune.serving.http.api_errors import ApiError
from gemma_tune.serving.sampling import Sampling


class Cancellable(Protocol):
    """An answer under way."""

    def cancel(self) -> None: ...


class RunningEngine(Protocol):
    """What is asked of `serving.engine.Engine` here."""

    def submit(self, request: Request, deliver: Callable[[AnswerDelta], None]) -> Cancellable: ...

    def drain(self, timeout_seconds: float) -> bool: ...

    def close(self) -> None: ...

    @property
    def stats(self) -> Any: ...

    @property
    def is_open(self) -> bool: ...


class ServedModel(NamedTuple):
    """A model that requests can name.

    Attributes:
        name: In requests.
        adapter: Of the engine; `BASE` for the model as it was loaded.
        parent: Name of the model under the adapter; '' for that one itself.
        version: Of its weights, so that what is said of an answer can be traced.
    """

    name: str
    adapter: str
    parent: str
    version: str


class RequestDefaults(NamedTuple):
    """What a request gets that doesn't say."""

    max_new_tokens: int
    sampling: Sampling


class Service(NamedTuple):
    """What is served.

    Attributes:
        engine: Started.
        models: By name; the first is the one to try first.
        tokenizer, template, stop_ids: Of all of them.
        max_length: Longest prompt with its answer, in tokens.
        defaults: What a request gets that doesn't say.
        created: When it was started, in seconds since 1970.
    """

    engine: RunningEngine
    models: Mapping[str, ServedModel]
    tokenizer: TextTokenizer
    template: ChatTemplate
    stop_ids: tuple[int, ...]
    max_length: int
    defaults: RequestDefaults
    created: int = int(time.time())

    def model(self, name: str) -> ServedModel:
        """Returns the model of a name.

        Raises:
            ApiError: There is none; says which there are.
        """
        if name in self.models:
            return self.models[name]
        names = ", ".join(self.models)
        raise ApiError(
            404,
            f"There is no model {name[:100]!r}.{did_you_mean(name[:100], self.models)} Models: {names}.",
            param="model",
            code="model_not_found",
        )

    def describe(self, model: ServedModel) -> dict[str, Any]:
        """Returns a model as GET /v1/models shows it."""
        return {
            "id": model.name,
            "object": "model",
            "created": self.created,
            "owned_by": "gemma_tune",
            "parent": model.parent or None,
            "version": model.version,
            "max_model_len": self.max_length,
        }
