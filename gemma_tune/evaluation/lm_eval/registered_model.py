"""Registers gemma_tune's models with lm-eval under the name `gemma_tune`."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.evaluation.lm_eval.requests import ModelRequests
from gemma_tune.models.load import load_model
from gemma_tune.models.sharding.placement import make_mesh_sharding
from gemma_tune.quantization.spec import SCHEMES, QuantSpec
from gemma_tune.runtime.backend import jax, keras

MODEL_NAME = "gemma_tune"
_OF_LOADING = ("source", "adapter", "quantize", "block_size", "precision", "mesh", "seed")
_OF_REQUESTS = ("max_length", "batch_size")


@functools.cache
def lm_eval_class() -> type:
    """Returns the class GemmaTuneLM, an lm-eval model that answers with a model of ours, and registers it.

    It takes the arguments of `ModelRequests`. It is made here, since its base class is lm-eval's.

    Raises:
        ConfigError: lm-eval isn't installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ConfigError("This needs the package lm-eval. Run: pip install 'gemma-tune[lm_eval]'") from error

    @register_model(MODEL_NAME)
    class GemmaTuneLM(ModelRequests, TemplateLM):
        """A model of gemma_tune, for lm-eval."""

        @classmethod
        def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: Any = None) -> Any:
            """Loads the model that `--model_args` describes."""
            del additional_config  # Device and batch size: JAX's own, and `batch_size` of the arguments.
            return cls(load_described(arg_dict), **{name: arg_dict[name] for name in _OF_REQUESTS if name in arg_dict})

        @classmethod
        def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> Any:
            """Loads the model that a text such as `source=demo,quantize=int8` describes."""
            from lm_eval.utils import simple_parse_args_string

            return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    return GemmaTuneLM


def load_described(arguments: Mapping[str, Any]) -> keras.Model:
    """Loads the model that lm-eval's `--model_args` describes.

    Args:
        arguments: `source`, as in `load_model`; and, if wanted, `adapter`, `quantize` with `block_size`, `precision`,
            `mesh` (axes joined by +, such as fsdp:2+model:2) and `seed`. Those of `ModelRequests` are left alone.

    Raises:
        ConfigError: `source` is missing, or there is no such argument or quantization.
        ModelError: The model can't be loaded.
    """
    known = (*_OF_LOADING, *_OF_REQUESTS)
    for name in arguments:
        if name not in known:
            raise ConfigError(
                f"model_args has no {name!r}.{did_you_mean(name, known)} It takes: {', '.join(known)}. The model is "
                "named by source=…"
            )
    if not arguments.get("source"):
        raise ConfigError("model_args needs a model: source=demo, source=runs/mine, or any other source.")
    scheme = arguments.get("quantize")
    if scheme and scheme not in SCHEMES:
        raise ConfigError(
            f"quantize must be one of {', '.join(SCHEMES)}; got {scheme!r}.{did_you_mean(str(scheme), SCHEMES)}"
        )
    quant_spec = QuantSpec(scheme) if scheme else None
    if quant_spec and "block_size" in arguments:
        quant_spec = quant_spec._replace(block_size=int(arguments["block_size"]))
    given = {name: arguments[name] for name in ("adapter", "precision", "seed") if name in arguments}
    # lm-eval cuts its arguments at commas. The scorer has a row for each device, whatever the mesh.
    mesh = str(arguments.get("mesh") or "").replace("+", ",")
    sharding = make_mesh_sharding(mesh, jax.device_count()) if mesh else None
    return load_model(str(arguments["source"]), quant_spec=quant_spec, sharding=sharding, **given)


def with_default_model(arguments: Sequence[str]) -> list[str]:
    """Returns the command line of lm-eval with `--model gemma_tune`, if it evaluates and names no model."""
    evaluates = bool(arguments) and arguments[0] not in ("ls", "validate", "-h", "--help")
    names_one = any(
        word in ("--model", "-M", "--config", "-C") or word.startswith(("--model=", "--config=")) for word in arguments
    )
    return [*arguments, "--model", MODEL_NAME] if evaluates and not names_one else list(arguments)
