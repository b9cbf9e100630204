"""The notebook runs from top to bottom in a real kernel, and its outputs are not in the repository."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"


def test_outputs_are_cleared() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FPT_CACHE_DIR", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Profiles of the user's own Jupyter stay out of it.
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    last, table = notebook.cells[-1].outputs[0], notebook.cells[-2].outputs[0]
    assert "images[0]\tstripe" in table["data"]["text/plain"]
    assert last["data"]["text/plain"].startswith("array(")
    written = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    errors = [output.text for output in written if output.get("name") == "stderr" and "TqdmWarning" not in output.text]
    assert errors == [], "the functions are quiet"
    assert (tmp_path / "my-study/outputs/evaluation/report.html").is_file()
