"""Notebooks in a real Jupyter kernel, top to bottom. `nbdev_test` runs all of them in its own way on every `make test`;
here a few quick ones run as a reader runs them, and all of them with BRAIN_VIT_ALL_NOTEBOOKS=1."""
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NBS = Path(__file__).parent.parent / "nbs"
QUICK = ["00_base", "index", "results", "limits"]
CHOSEN = sorted(path.stem for path in NBS.glob("*.ipynb")) if os.environ.get("BRAIN_VIT_ALL_NOTEBOOKS") == "1" else QUICK


def evaluated(notebook):
    "Without the cells that are to be read only (`#| eval: false`)."
    for cell in notebook.cells:
        if cell.cell_type == "code" and "eval: false" in cell.source:
            cell.source = ""
    return notebook


def printed(notebook, kinds=("text/markdown", "text/plain")):
    "What the code cells show as text, cell by cell."
    return ["".join(output.get("text", "") or "".join("".join(output.data.get(kind, "")) for kind in kinds[:1]) for output in cell.outputs
                    if output.get("name") != "stderr" and output.output_type != "error")
            for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", CHOSEN)
def test_notebook_runs_in_a_kernel(name, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    monkeypatch.setenv("PYTHONPATH", str(NBS.parent))
    committed = nbformat.read(NBS / f"{name}.ipynb", as_version=4)
    run = evaluated(nbformat.read(NBS / f"{name}.ipynb", as_version=4))
    NotebookClient(run, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(NBS)}}).execute()
    if name in ("index", "results", "limits"):  # made from committed files alone, so a run must print what is committed
        assert printed(run) == printed(committed), f"{name}.ipynb does not show what benchmarks/ holds: run it again"
