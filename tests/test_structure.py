"""The house: every module imports, imports point down, and the outside is cheap."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_tune

PACKAGE = Path(gemma_tune.__file__).parent
MODULES = sorted(
    str(path.relative_to(PACKAGE.parent).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if "assets" not in path.parts and path.name != "__main__.py"
)
# A module may import from its own layer and from those below it.
LAYERS = (
    ("errors", "version", "settings", "process_memory", "imports", "files", "mesh", "quantization"),
    ("config", "config_checks", "serve_config", "keras_runtime", "processes", "progress"),
    ("data", "models"),
    ("training", "serving"),
    ("evaluation", "export", "planning"),
    ("pipeline",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# These compute with arrays and text alone, so that they can be read and tested without a model.
WITHOUT_KERAS = (
    "data",
    "quantization",
    "training.losses",
    "training.optimizer",
    "training.batches",
    "serving.sampling",
    "evaluation.answers",
    "evaluation.fidelity",
    "evaluation.heldout",
)


def imported_modules(module):
    path = PACKAGE.parent / (module.replace(".", "/") + ".py")
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_it_imports(module):
    importlib.import_module(module)


@pytest.mark.parametrize("module", [module for module in MODULES if module.count(".")])
def test_imports_point_down(module):
    level = LEVEL[module.split(".")[1]]
    for imported in imported_modules(module):
        if imported.startswith("gemma_tune."):
            assert LEVEL[imported.split(".")[1]] <= level, f"{module} imports {imported}"


def test_data_and_models_know_nothing_of_each_other():
    for module in MODULES:
        for one, other in (("data", "models"), ("models", "data")):
            if module.startswith(f"gemma_tune.{one}"):
                assert not [name for name in imported_modules(module) if name.startswith(f"gemma_tune.{other}")], module


@pytest.mark.parametrize("module", [m for m in MODULES if m.removeprefix("gemma_tune.").startswith(WITHOUT_KERAS)])
def test_pure_modules_import_no_keras(module):
    assert not [name for name in imported_modules(module) if "keras" in name]


_READ_A_CONFIG = {"gemma_tune.training.workdir", "gemma_tune.models.load"}  # To write it down; to load what it names.


def test_only_pipeline_and_command_line_read_a_config():
    for module in MODULES:
        if module.startswith(
            (
                "gemma_tune.data",
                "gemma_tune.models",
                "gemma_tune.training",
                "gemma_tune.evaluation",
                "gemma_tune.export",
                "gemma_tune.serving",
            )
        ):
            text = (
                (PACKAGE.parent / (module.replace(".", "/") + ".py")).read_text()
                if "." in module and not (PACKAGE.parent / module.replace(".", "/")).is_dir()
                else ""
            )
            assert "config: Config" not in text or module in _READ_A_CONFIG, module


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_gemma_tune_is_cheap():
    code = "import time; t = time.perf_counter(); import gemma_tune, sys; print(time.perf_counter() - t, 'jax' in sys.modules, 'numpy' in sys.modules)"
    seconds, jax, numpy = min(run_python(code) for _ in range(7)).split()
    assert (jax, numpy) == ("False", "False")
    assert float(seconds) < 0.3


def test_tensorflow_is_hidden_only_while_keras_hub_is_imported():
    code = (
        "import sys; import gemma_tune.keras_runtime as k; print([m for m in sys.modules if "
        "m.startswith('tensorflow')],"
        "k.keras.config.backend()); import importlib.util; print(importlib.util.find_spec('tensorflow') is not None)"
    )
    assert run_python(code).splitlines() == ["[] jax", "True"]


def test_another_backend_is_refused():
    code = (
        "import os; os.environ['KERAS_BACKEND'] = 'numpy'; import keras; import gemma_tune\n"
        "try:\n    gemma_tune.load_model('tiny')\nexcept gemma_tune.ConfigError as error:\n    print(error)"
    )
    assert "needs Keras on the JAX backend, but Keras runs on 'numpy'" in run_python(code)


def test_public_names_exist():
    for name in gemma_tune.__all__:
        assert getattr(gemma_tune, name) is not None
    assert set(gemma_tune.__all__) <= set(dir(gemma_tune))
    with pytest.raises(AttributeError):
        gemma_tune.no_such_name  # noqa: B018


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module):
    path = PACKAGE.parent / (module.replace(".", "/") + ".py")
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{module} says nothing of itself"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name}"
