"""The models that a server offers, the engine behind them, and the defaults of requests."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from gemma_tune.errors import did_you_mean
from gemma_tune.serving.engine.request import AnswerDelta, Request
from gemma_tune.serving.http.api_errors import ApiError
from gemma_tune.serving.prompt_encoder import PromptEncoder
from gemma_tune.serving.sampling import Sampling


class Cancellable(Protocol):
    """An answer that can be cancelled."""

    def cancel(self) -> None: ...


class RunningEngine(Protocol):
    """What the server needs of an `Engine`."""

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
        name: Name in requests.
        adapter: Name of the engine's adapter; `BASE` for the base model itself.
        parent: Name of the base model under the adapter; "" for the base model itself.
        version: Version of the weights, by which feedback on an answer can be traced.
    """

    name: str
    adapter: str
    parent: str
    version: str


class RequestDefaults(NamedTuple):
    """The settings of requests that don't set them.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        sampling: Sampling settings.
    """

    max_new_tokens: int
    sampling: Sampling


class Service(NamedTuple):
    """Everything that a server serves.

    Attributes:
        engine: Engine, started.
        models: Name -> model; the first is the one that the chat page selects.
        encoder: Prompt encoder of all models.
        max_length: Longest prompt with its answer, in tokens.
        defaults: Settings of requests that don't set them.
        created: Start time, in seconds since 1970.
    """

    engine: RunningEngine
    models: Mapping[str, ServedModel]
    encoder: PromptEncoder
    max_length: int
    defaults: RequestDefaults
    created: int = int(time.time())

    def model(self, name: str) -> ServedModel:
        """Returns the model with a name.

        Raises:
            ApiError: There is no such model; lists those that there are.
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
