"""Nothing that is loaded from a model, an adapter or a data file is ever executed."""

import ast
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from helpers.checkpoints import write_hf

import gemma_tune
from gemma_tune.errors import GemmaTuneError, ModelError
from gemma_tune.models.load import load_model
from gemma_tune.models.lora.adapter import load_adapter
from gemma_tune.models.preset import save_preset
from gemma_tune.runtime.atomic_files import CHECKSUMS
from gemma_tune.runtime.backend import keras

PACKAGE = Path(gemma_tune.__file__).parent
EXECUTES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "runpy"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load"}
UNSAFE_ARGUMENTS = {"safe_mode", "allow_pickle", "trust_remote_code"}
# A config file given by --config is the user's own program; the table of presets is keras-hub's.
ALLOWED = {
    ("cli/config_resolution.py", "runpy"),
    ("evaluation/metrics/own_function.py", "importlib.util.spec_from_file_location"),  # The user's own metric.
    ("models/sources/preset_catalog.py", "runpy"),
}


def executing(tree):
    """Yields what in a module can run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in EXECUTES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {node.module.split(".")[0], *(alias.name for alias in node.names)}
            yield from modules & EXECUTES
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in UNSAFE_CALLS or name.endswith(("enable_unsafe_deserialization", "spec_from_file_location")):
                yield name
            yield from (f"{name}({word.arg})" for word in node.keywords if word.arg in UNSAFE_ARGUMENTS)


def found_in(folder):
    return {
        (path.relative_to(folder).as_posix(), what)
        for path in folder.rglob("*.py")
        for what in executing(ast.parse(path.read_text()))
    }


def test_no_module_can_run_what_it_reads():
    assert found_in(PACKAGE) == ALLOWED


@pytest.mark.parametrize(
    "code, what",
    [
        ("import pickle", "pickle"),
        ("import torch, pickle as p", "pickle"),
        ("from pickle import loads", "pickle"),
        ("def f():\n    from joblib.externals import loky", "joblib"),
        ("from six.moves import cPickle", "cPickle"),
        ("eval(path.read_text())", "eval"),
        ("exec(code, {})", "exec"),
        ("torch.load(path)", "torch.load"),
        ("__import__(name)", "__import__"),
        ("keras.config.enable_unsafe_deserialization()", "keras.config.enable_unsafe_deserialization"),
        ("importlib.util.spec_from_file_location('m', path)", "importlib.util.spec_from_file_location"),
        ("keras.saving.load_model(path, safe_mode=False)", "keras.saving.load_model(safe_mode)"),
        ("np.load(path, allow_pickle=True)", "np.load(allow_pickle)"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "AutoModel.from_pretrained(trust_remote_code)"),
    ],
)
def test_planted_code_is_found(tmp_path, code, what):
    """Negative control of the test above, in a folder of the same shape."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "harmless.py").write_text("import re\nimport json\nre.match('a', 'b')\njson.loads('{}')\n")
    assert found_in(tmp_path) == set()
    (tmp_path / "models" / "planted.py").write_text(code)
    assert found_in(tmp_path) == {("models/planted.py", what)}


class Bomb:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return os.mkdir, (self._path,)


@pytest.fixture
def bomb(tmp_path):
    """A pickle, and a function that asserts that nothing has loaded it."""
    armed, mark = tmp_path / "control", tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(armed)))
    assert armed.is_dir()  # Control: whoever loads one executes it.
    yield pickle.dumps(Bomb(mark))
    assert not mark.exists()


def test_pickles_in_place_of_weights_are_not_loaded(tiny, tmp_path, bomb):
    directory = write_hf(tiny(), "gemma3", tmp_path / "hf")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    (directory / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(directory))
    (directory / "model.safetensors").write_bytes(bomb)
    with pytest.raises(ModelError, match="can't be read as safetensors"):
        load_model(str(directory))
    (tmp_path / "m.gguf").write_bytes(bomb)
    with pytest.raises(ModelError, match="is not a GGUF file"):
        load_model(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.lora.h5", "adapter_model.bin", "adapter.npz"])
def test_pickles_in_place_of_an_adapter_are_not_loaded(tiny, tmp_path, bomb, name):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (tmp_path / "adapter" / name).write_bytes(bomb)
    for place in (tmp_path / "adapter", tmp_path / "adapter" / name):
        with pytest.raises(GemmaTuneError):
            load_adapter(tiny(), place)


def test_pickled_arrays_are_not_loaded(tmp_path, bomb):
    """NumPy itself refuses, as long as nobody says allow_pickle."""
    np.save(tmp_path / "array.npy", np.array([Bomb(tmp_path / "executed")], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "array.npy")


def test_code_that_a_checkpoint_brings_along_is_not_imported(tiny, tmp_path):
    """As transformers would, with trust_remote_code."""
    directory = write_hf(tiny(), "gemma3", tmp_path / "hf")
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Gemma"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling.py").write_text(f"import os; os.mkdir({str(tmp_path / 'executed')!r})\nclass Gemma: pass\n")
    load_model(str(directory))
    assert not (tmp_path / "executed").exists()


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
