"""Undoes what was swapped in a model's layers for a while."""

import contextlib
from collections.abc import Iterator

from gemma_tune.models.layers import iter_layers
from gemma_tune.runtime.backend import keras_hub


@contextlib.contextmanager
def restored_layers(backbone: keras_hub.models.Backbone) -> Iterator[None]:
    """A context in which parts of a backbone's layers may be swapped.

    On leaving it, the class and the attributes of each layer are the same objects as before. Arrays that were assigned
    to variables stay.
    """
    before = [(layer, type(layer), dict(vars(layer))) for layer in (backbone, *iter_layers(backbone))]
    try:
        yield
    finally:
        for layer, kind, attributes in before:
            if type(layer) is not kind:
                object.__setattr__(layer, "__class__", kind)
            for name in vars(layer).keys() - attributes.keys():
                object.__delattr__(layer, name)
            for name, value in attributes.items():
                if vars(layer).get(name) is not value or name not in vars(layer):
                    object.__setattr__(layer, name, value)
