"""Nothing that is loaded from a model, adapter or data file is ever executed."""

import ast
import json
from pathlib import Path

import pytest

import gemma_tune
from gemma_tune.errors import ModelError
from gemma_tune.models.load import load_model
from gemma_tune.models.preset import save_preset
from gemma_tune.runtime.atomic_files import CHECKSUMS
from gemma_tune.runtime.backend import keras

PACKAGE = Path(gemma_tune.__file__).parent
EXECUTES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "runpy"}
# A config file given by --config is the user's own program; the table of presets is keras-hub's.
ALLOWED = {("cli/flags.py", "runpy"), ("models/sources/preset_catalog.py", "runpy")}


def executing(tree):
    """Yields what in a module can run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in EXECUTES)
        elif isinstance(node, ast.ImportFrom) and node.module in EXECUTES:
            yield node.module
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "compile", "torch.load") or name.endswith("enable_unsafe_deserialization"):
                yield name
            if any(word.arg == "safe_mode" or word.arg == "allow_pickle" for word in node.keywords):
                yield f"{name}(safe_mode or allow_pickle)"


def test_no_module_can_run_what_it_reads():
    found = {
        (str(path.relative_to(PACKAGE)), what)
        for path in PACKAGE.rglob("*.py")
        for what in executing(ast.parse(path.read_text()))
    }
    assert found - ALLOWED == {("cli/doctor.py", "importlib.util"), ("models/load.py", "importlib.util")} & found
    assert found >= ALLOWED  # Control: it sees what there is.


def test_a_preset_with_code_in_it_is_refused(tmp_path):
    """Keras writes a Lambda layer's code into the config, and would unpack it."""
    save_preset(load_model("tiny:gemma3"), tmp_path / "preset")
    (tmp_path / "preset" / CHECKSUMS).unlink()
    layer = keras.layers.Lambda(lambda x: print("executed") or x)
    text = json.dumps(keras.saving.serialize_keras_object(layer))
    assert '"__lambda__"' in text  # Control: there is code in it.
    (tmp_path / "preset" / "config.json").write_text(text)
    with pytest.raises(ModelError):
        load_model(str(tmp_path / "preset"))
