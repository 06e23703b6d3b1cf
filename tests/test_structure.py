"""The house: every module imports, imports point down, and the outside is cheap."""

import ast
import importlib
import re
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
# A room may import from those above it in this table, and modules of one room from each other. What stands on one line
# knows nothing of its neighbours there.
LAYERS = {
    "": (
        ("errors", "lazy_names", "version", "saved_settings"),
        ("mesh", "settings", "quantization"),
        ("runtime",),
        ("config_checks", "config_groups"),
        ("config", "serve_config"),
        ("workdir_config",),
        ("data", "models"),
        ("training", "serving"),
        ("evaluation", "export", "planning"),
        ("pipeline",),
        ("tuning",),
        ("cli",),
    ),
    "data": (
        ("example", "dedup", "chunks", "mixture"),
        ("storage", "rows", "tool_markup"),
        ("sources",),
        ("chat_template", "cleaning", "heldout_split", "packing", "fit_length"),
        ("tokenize", "cleaning_report"),
        ("cleaned_examples",),
        ("splits",),
        ("tokenized_splits",),
    ),
    "models": (
        ("family", "einsum", "layers"),
        ("cpu",),
        ("functional", "linear", "lm_head", "restored_layers"),
        ("blocks", "base_fingerprint", "sharding"),
        ("attention", "lora"),
        ("quantized", "precision", "remat"),
        ("preset",),
        ("sources",),
        ("load", "transforms"),
        ("shared_copy",),
    ),
    "training": (
        ("moments",),
        ("losses", "optimizer", "batches", "prefetch", "guard", "state_shardings"),
        ("state",),
        ("step", "calibration"),
        ("run",),
    ),
    "serving": (
        ("sampling", "text_stream", "feedback", "logit_changes", "grammar"),
        ("prompt_encoder", "tools"),
        ("engine",),
        ("decode",),
        ("generation",),
        ("conversation",),
        ("http",),
    ),
    "tuning": (
        ("budget", "metrics", "storage", "spaces", "runner"),
        ("trials", "search", "memory"),
        ("trial_run",),
        ("study",),
        ("results", "forecast"),
        ("workers",),
        ("start",),
    ),
    "export": (
        ("options", "jinja_template"),
        ("card", "hf"),
        ("gguf", "peft", "litert", "keras_preset"),
        ("writers",),
        ("export_formats",),
        ("model_export",),
    ),
}
# These compute with arrays and text alone, so that they can be read and tested without a model.
WITHOUT_KERAS = (
    "data",
    "quantization",
    "training.losses.cross_entropy",
    "training.losses.target_positions",
    "training.losses.vocabulary_tiles",
    "training.moments",
    "training.optimizer",
    "training.batches",
    "serving.logit_changes",
    "serving.sampling",
    "evaluation.answers",
    "evaluation.case",
    "evaluation.fidelity",
    "evaluation.heldout",
    "evaluation.judge",
    "evaluation.likelihood.continuation_batches",
    "evaluation.metrics",
    "evaluation.resampling",
    "evaluation.suites",
)


def source_of(module):
    path = PACKAGE.parent / (module.replace(".", "/") + ".py")
    return (path if path.exists() else path.with_suffix("") / "__init__.py").read_text()


def imported_modules(module):
    """Yields the modules that a module imports; `from package import module` names that module."""
    for node in ast.walk(ast.parse(source_of(module))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_it_imports(module):
    importlib.import_module(module)


def arrows(room):
    """Yields (module, room it is in, room it imports from) for all imports between the rooms of a table."""
    prefix = f"gemma_tune.{room}." if room else "gemma_tune."
    for module in MODULES:
        if not module.startswith(prefix):
            continue
        for imported in imported_modules(module):
            if imported.startswith(prefix):
                yield module, module.removeprefix(prefix).split(".")[0], imported.removeprefix(prefix).split(".")[0]


@pytest.mark.parametrize("room", LAYERS)
def test_imports_point_one_way(room):
    level = {name: level for level, names in enumerate(LAYERS[room]) for name in names}
    found = list(arrows(room))
    assert found and all(name in level for _, name, _ in found)
    wrong = [
        f"{module} imports {target}"
        for module, name, target in found
        if target != name and not level[target] < level[name]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", LAYERS)
def test_the_table_names_every_room_and_no_other(room):
    folder = PACKAGE / room
    there = {path.stem for path in folder.glob("*.py")} | {
        path.name for path in folder.iterdir() if (path / "__init__.py").exists()
    }
    assert there - {"__init__", "__main__"} == {name for names in LAYERS[room] for name in names}


def test_no_folder_is_overfull():
    """`cli/` has a module for each verb."""
    for folder in {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE / "cli"}:
        names = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(names) <= 15, f"{folder} has {len(names)} modules: give some a room of their own"


def public_names():
    for module in MODULES:
        for node in ast.parse(source_of(module)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                yield node.name, module


def test_no_public_name_means_two_things():
    seen = {}
    for name, module in public_names():
        seen.setdefault(name, []).append(module)
    assert {name: modules for name, modules in seen.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("module", [m for m in MODULES if m.removeprefix("gemma_tune.").startswith(WITHOUT_KERAS)])
def test_pure_modules_import_no_keras(module):
    assert not [name for name in imported_modules(module) if "keras" in name]


_READ_A_CONFIG = {
    "gemma_tune.training.run.workdir",  # Writes it down.
    "gemma_tune.training.run.same_settings",  # Compares it with what was written.
    "gemma_tune.models.load",  # Loads what it names.
}


def test_only_pipeline_and_command_line_take_a_config():
    """No other function has a parameter that is a `Config`, whatever it is called there."""
    for module in MODULES:
        if module.split(".")[1:2] and module.split(".")[1] in (
            "data",
            "models",
            "training",
            "evaluation",
            "export",
            "serving",
        ):
            taking = [
                node.name
                for node in ast.walk(ast.parse(source_of(module)))
                if isinstance(node, ast.FunctionDef)
                for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                if argument.annotation is not None
                and re.search(r"(?<!uvicorn\.)\bConfig\b", ast.unparse(argument.annotation))
            ]
            assert not taking or module in _READ_A_CONFIG, f"{module}: {taking}"


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_gemma_tune_is_cheap():
    code = "import time; t = time.perf_counter(); import gemma_tune, sys; print(time.perf_counter() - t, 'jax' in sys.modules, 'numpy' in sys.modules)"
    seconds, jax, numpy = min(run_python(code) for _ in range(7)).split()
    assert (jax, numpy) == ("False", "False")
    assert float(seconds) < 0.3


def test_tensorflow_is_hidden_only_while_keras_hub_is_imported():
    code = (
        "import sys; import gemma_tune.runtime.backend as k; print([m for m in sys.modules if "
        "m.startswith('tensorflow')],"
        "k.keras.config.backend()); import importlib.util; print(importlib.util.find_spec('tensorflow') is not None)"
    )
    assert run_python(code).splitlines() == ["[] jax", "True"]


@pytest.mark.parametrize(
    "backend, before",
    [("numpy", "import keras; import gemma_tune"), ("numpy", "import gemma_tune"), ("tensorflow", "import gemma_tune")],
)
def test_another_backend_stays_and_is_refused(backend, before):
    """What the user has set isn't overwritten, whether Keras was imported or not."""
    code = (
        f"import os; os.environ['KERAS_BACKEND'] = {backend!r}; {before}\n"
        "try:\n    gemma_tune.load_model('tiny')\nexcept gemma_tune.ConfigError as error:\n    print(error)\n"
        "print(os.environ['KERAS_BACKEND'])"
    )
    message, stays = run_python(code).splitlines()
    assert f"needs Keras on the JAX backend, but Keras runs on {backend!r}. Set the environment" in message
    assert stays == backend


def test_without_a_choice_keras_runs_on_jax(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "")
    assert run_python("import gemma_tune, os; print(os.environ['KERAS_BACKEND'])").strip() == "jax"


def test_public_names_exist():
    for name in gemma_tune.__all__:
        assert getattr(gemma_tune, name) is not None
    assert set(gemma_tune.__all__) <= set(dir(gemma_tune))
    with pytest.raises(AttributeError):
        gemma_tune.no_such_name  # noqa: B018


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module):
    tree = ast.parse(source_of(module))
    assert ast.get_docstring(tree), f"{module} says nothing of itself"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name}"
