"""Reads a suite: the file `suite.yaml` of a folder, and the files of questions that it names."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_tune.config_groups import GenerationConfig
from gemma_tune.errors import ConfigError, DataError, did_you_mean
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.metric import Metric
from gemma_tune.evaluation.read_cases import read_cases
from gemma_tune.evaluation.suites.suite import Suite, SuitePart, parse_requirement

SUITE_FILE = "suite.yaml"
_SHIPPED = Path(__file__).parent
_OTHER_SOURCES = ("sample:", "tfds:", "hf://")  # Everything else is a file in the suite's folder.
_SUITE_KEYS = ("name", "description", "parts", "generation")
_PART_KEYS = ("name", "data", "metrics", "must", "must_not_regress", "must_not_contain", "max_latency_seconds")


def shipped_suites() -> list[str]:
    """Returns the names of the suites that come with gemma_tune."""
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{SUITE_FILE}"))


def load_suite(source: str | os.PathLike, metrics: Mapping[str, Metric]) -> Suite:
    """Returns a suite with all its questions.

    Args:
        source: Folder with a `suite.yaml`, that file itself, or the name of a shipped suite.
        metrics: Known metrics by name.

    Raises:
        ConfigError: `suite.yaml` is missing, or says something that can't be understood.
        DataError: A file of questions can't be read, or a metric doesn't suit its questions.
    """
    path = _find(source)
    tree = _read_yaml(path)
    _check_keys(tree, _SUITE_KEYS, str(path))
    entries = _list_of(tree.get("parts"), dict, f"{path}: 'parts'")
    if not entries:
        raise ConfigError(f"{path}: 'parts' is empty. A suite needs at least one part with a name and data.")
    parts = tuple(
        _part(entry, f"{path}: part {number}", path.parent, metrics) for number, entry in enumerate(entries, 1)
    )
    names = [part.name for part in parts]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"{path}: several parts are called {', '.join(repeated)}. Each needs a name of its own.")
    _check_suited(parts, metrics, str(path))
    name = _text(tree.get("name", path.parent.name), f"{path}: 'name'")
    description = _text(tree.get("description", ""), f"{path}: 'description'")
    return Suite(name, description.strip(), parts, _generation(tree.get("generation") or {}, str(path)))


def _find(source: str | os.PathLike) -> Path:
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return path
    if (path / SUITE_FILE).is_file():
        return path / SUITE_FILE
    if path.is_dir():
        raise ConfigError(f"{path} has no {SUITE_FILE}. Files found: {', '.join(sorted(os.listdir(path))) or 'none'}.")
    names = shipped_suites()
    if str(source) in names:
        return _SHIPPED / str(source) / SUITE_FILE
    raise ConfigError(
        f"There is no suite {str(source)!r}. Expected a folder with a {SUITE_FILE}, or a shipped suite: "
        f"{', '.join(names)}.{did_you_mean(str(source), names)}"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} should be a mapping with the keys {', '.join(_SUITE_KEYS)}, found {tree!r:.60}.")
    return tree


def _part(entry: dict[str, Any], origin: str, folder: Path, metrics: Mapping[str, Metric]) -> SuitePart:
    _check_keys(entry, _PART_KEYS, origin)
    for key in ("name", "data"):
        if key not in entry:
            raise ConfigError(f"{origin}: {key!r} is missing. Keys found: {', '.join(map(str, entry))}.")
    name = _text(entry["name"], f"{origin}: 'name'")
    origin = f"{origin} ({name})"
    must = tuple(parse_requirement(text, f"{origin}: 'must'") for text in _texts(entry, "must", origin))
    must_not_regress = tuple(_texts(entry, "must_not_regress", origin))
    named = [*_texts(entry, "metrics", origin), *(wanted.metric for wanted in must), *must_not_regress]
    cases = _read_questions(_text(entry["data"], f"{origin}: 'data'"), folder, origin)
    _check_names(named, metrics, origin)
    for metric in must_not_regress:
        if metrics[metric].is_higher_better is None:
            raise ConfigError(f"{origin}: 'must_not_regress' has {metric}, of which neither more nor less is better.")
    return SuitePart(
        name,
        cases,
        tuple(dict.fromkeys(named)),
        must,
        must_not_regress,
        _forbidden(entry.get("must_not_contain"), f"{origin}: 'must_not_contain'"),
        _seconds(entry.get("max_latency_seconds"), f"{origin}: 'max_latency_seconds'"),
    )


def _read_questions(data: str, folder: Path, origin: str) -> tuple[EvalCase, ...]:
    is_file = not data.startswith(_OTHER_SOURCES)
    try:
        return tuple(read_cases(str(folder / data) if is_file else data))
    except DataError as error:
        raise DataError(f"{origin}: {error}") from error


def _check_names(names: Iterable[str], metrics: Mapping[str, Metric], origin: str) -> None:
    for name in names:
        if name not in metrics:
            known = ", ".join(sorted(metrics))
            raise ConfigError(f"{origin}: there is no metric {name!r}.{did_you_mean(name, metrics)} Known: {known}.")


def _check_suited(parts: Sequence[SuitePart], metrics: Mapping[str, Metric], origin: str) -> None:
    """Checks that each metric suits the questions of the parts that need it, all together: so they are scored."""
    for name in dict.fromkeys(name for part in parts for name in part.metrics):
        needing = [part for part in parts if name in part.metrics]
        problem = metrics[name].problem([case for part in needing for case in part.cases])
        if problem:
            where = ", ".join(part.name for part in needing)
            raise DataError(f"{origin}: the metric {name} doesn't suit the questions of {where}: {problem}")


def _forbidden(value: Any, origin: str) -> dict[str, int]:
    """Returns how many answers may contain each text."""
    if isinstance(value, dict):
        for text, count in value.items():
            if not isinstance(text, str) or not text or type(count) is not int or count < 0:
                raise ConfigError(
                    f"{origin} should say how many answers may contain a text, found {text!r}: {count!r}."
                )
        return value
    return dict.fromkeys(_list_of(value, str, origin), 0)


def _seconds(value: Any, origin: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(f"{origin} must be a number above 0, got {value!r}.")
    return float(value)


def _generation(settings: Any, origin: str) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise ConfigError(f"{origin}: 'generation' should be a mapping of settings, found {settings!r:.60}.")
    _check_keys(settings, [field.name for field in dataclasses.fields(GenerationConfig)], f"{origin}: 'generation'")
    return settings


def _check_keys(found: Mapping[Any, Any], known: Iterable[str], origin: str) -> None:
    known = list(known)
    for key in found:
        if key not in known:
            raise ConfigError(
                f"{origin}: unknown key {key!r}.{did_you_mean(str(key), known)} Known: {', '.join(known)}."
            )


def _texts(entry: dict[str, Any], key: str, origin: str) -> list[str]:
    return _list_of(entry.get(key), str, f"{origin}: {key!r}")


def _list_of(value: Any, item_type: type, origin: str) -> list[Any]:
    """Returns a list; one item alone counts as a list of it, and None as an empty one."""
    items = [] if value is None else value if isinstance(value, list) else [value]
    wrong = [item for item in items if not isinstance(item, item_type) or item == ""]
    if wrong:
        kind = "texts" if item_type is str else "mappings"
        raise ConfigError(f"{origin} should be a list of {kind}, found {wrong[0]!r:.60}.")
    return items


def _text(value: Any, origin: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{origin} should be a text, found {value!r:.60}.")
    return value
