"""The notebook runs from top to bottom, on the tiny model."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[test]'")
nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[test]'")
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.nightly
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    for name, value in (("MODEL", "tiny"), ("WORKDIR", str(tmp_path / "run")), ("STEPS", "2")):
        monkeypatch.setenv(f"GEMMA_TUNE_NOTEBOOK_{name}", value)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), (
        "outputs are of one machine; the notebook is kept without"
    )
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "preset" / "config.json").exists()
