"""The notebooks run from top to bottom, on the tiny model."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[test]'")
nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[test]'")
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

WRITTEN = {
    "quickstart": ("run/report.html", "run/preset/config.json"),
    "evaluate_and_search": (
        "run/report.html",
        "run/evaluation/evaluation.html",
        "search/report.html",
        "search/best.py",
    ),
}


def test_each_notebook_is_known():
    assert {path.stem for path in NOTEBOOKS} == set(WRITTEN)


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
    assert [name for name in WRITTEN[path.stem] if not (tmp_path / name).exists()] == []
