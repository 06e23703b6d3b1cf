"""Random JSON schemas, of the kinds that clients send: what pydantic and hand-written tools make.

    random_schema(random.Random(0))

The same seed gives the same schema. Texts and lists may be unbounded, objects may have optional and further
properties, and schemas may refer to themselves.
"""

import random
from typing import Any

_WORDS = ("name", "title", "shelf", "price", "is open", "größe", "tags", "author", "id", "note", 'quote"d', "émigré")
_PATTERNS = ("^[A-Z]{2}[0-9]{3}$", "^(red|green) [a-z]+$", "^[0-9]{4}-[0-9]{2}$")
_FORMATS = ("date", "time", "uuid", "email")


def random_schema(rng: random.Random) -> dict[str, Any]:
    """Returns a schema whose outermost value is an object or a list, or any value once in eight."""
    kind = rng.choice(["object"] * 5 + ["array", "array", "any"])
    if rng.random() < 0.1:
        return _recursive(rng)
    return _object(rng, 3) if kind == "object" else _array(rng, 3) if kind == "array" else _value(rng, 3)


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    makers = [_text, _text, _number, _integer, _boolean, _null, _enum, _const]
    if depth > 0:
        makers += [_array, _object, _any_of, _object]
    return rng.choice(makers)(rng, depth - 1)


def _text(rng: random.Random, depth: int) -> dict[str, Any]:
    choice = rng.randrange(5)
    if choice == 0:
        return {"type": "string", "pattern": rng.choice(_PATTERNS)}
    if choice == 1:
        return {"type": "string", "format": rng.choice(_FORMATS)}
    if choice == 2:
        least = rng.randrange(4)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(12)}
    return {"type": "string"}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "number"} if rng.random() < 0.5 else {"type": "number", "minimum": -1.5, "maximum": 99}


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice([{"type": "integer"}, {"type": "integer", "minimum": 1, "exclusiveMaximum": 200}])


def _boolean(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "boolean"}


def _null(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "null"}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample([*_WORDS, 3, None, True], 3)}


def _const(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"const": rng.choice(_WORDS)}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    bounds = rng.choice([{}, {"maxItems": 3}, {"minItems": 1, "maxItems": 2}, {"minItems": 2}])
    return {"type": "array", "items": _value(rng, depth), **bounds}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randrange(1, 5))
    closed = rng.choice([{}, {"additionalProperties": False}, {"additionalProperties": False}])
    required = [name for name in names if rng.random() < 0.7]
    properties = {name: _value(rng, depth) for name in names}
    return {"type": "object", "properties": properties, "required": required, **closed}


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_value(rng, depth), {"type": "null"}]}


def _recursive(rng: random.Random) -> dict[str, Any]:
    node = {
        "type": "object",
        "properties": {"value": _text(rng, 0), "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        "required": ["value", "children"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}
