"""Whatever is given as a setting makes a Config that survives JSON, or a ConfigError that names the setting."""

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemma_tune.cli.config_resolution import apply_overrides, load_config_file
from gemma_tune.config import Config
from gemma_tune.errors import ConfigError
from gemma_tune.settings import setting_paths

PROPERTY = settings(derandomize=True, deadline=None, max_examples=150)
PATHS = sorted(setting_paths(Config))
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.lists(st.text(max_size=5), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    st.sampled_from(["int4", "nf4", "qlora", "full", "float16", "linear", "skip", 64, 0, -1, 1e-3, 10**30]),
)  # fmt: skip


def check(make):
    """Returns whether there is a Config."""
    try:
        config = make()
    except ConfigError as error:
        assert str(error)
        return False
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    return True


@PROPERTY
@given(st.dictionaries(st.sampled_from(PATHS), VALUES, max_size=4))
@example({"optimizer.learning_rate": math.nan})
@example({"optimizer.learning_rate": 10**400})
def test_any_values(changes):
    check(lambda: Config().replace(changes))


@PROPERTY
@given(
    st.recursive(
        VALUES,
        lambda inner: st.dictionaries(
            st.one_of(st.sampled_from([part for path in PATHS for part in path.split(".")]), st.text(max_size=5)),
            inner,
            max_size=4,
        ),
        max_leaves=8,
    )
)
def test_any_tree(tree):
    check(lambda: Config.from_dict(tree))


@PROPERTY
@given(
    st.lists(
        st.tuples(
            st.one_of(st.sampled_from(PATHS), st.text(max_size=8)),
            st.one_of(VALUES.map(str), st.text(max_size=12)),
        ),
        max_size=3,
    )
)
def test_any_override(pairs):
    check(lambda: apply_overrides(Config(), [f"--config.{key}={value}" for key, value in pairs]))


@pytest.mark.parametrize("name", ["config.json", "config.py"])
def test_any_file(tmp_path, name):
    @PROPERTY
    @given(
        st.one_of(
            st.binary(max_size=40), VALUES.map(lambda value: json.dumps(value).encode()), st.just(b'{"seed": ' + b"9" * 5000)
        )
    )  # fmt: skip
    def any_content(content):
        (tmp_path / name).write_bytes(content)
        check(lambda: load_config_file(str(tmp_path / name)))

    if name == "config.json":  # A .py file is the user's own program.
        any_content()
    else:
        (tmp_path / name).write_text("get_config = 7")
        assert not check(lambda: load_config_file(str(tmp_path / name)))


def test_both_ends_are_met():
    """Control: some of the drawn settings are taken, and some refused."""
    met = set()

    @PROPERTY
    @given(st.sampled_from(PATHS), VALUES)
    def meet(path, value):
        met.add(check(lambda: Config().replace({path: value})))

    meet()
    assert met == {True, False}
