import json
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "mnist.ipynb"


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(notebook):
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def test_the_committed_outputs_are_those_of_one_run_from_top_to_bottom():
    notebook = read()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(notebook) == 6
    assert "593,200" in printed(notebook)
    assert "on 2 processes" in printed(notebook)
    assert "Traceback" not in json.dumps(notebook)


def test_the_first_cell_names_what_a_notebook_needs_beside_the_package():
    first = read().cells[0].source
    [extra] = re.findall(r"pip install -e '\.\[(\w+)\]'", first)
    extras = tomllib.loads((NOTEBOOK.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(package.startswith("ipykernel") for package in extras[extra])
    assert "pip install jupyterlab" in first
    assert "make" not in first  # which installs no kernel where it only trains


@pytest.mark.slow
def test_the_notebook_runs_from_scratch(tmp_path):
    notebook = read()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.source = cell.source.replace("train_size=12_800", "train_size=1_280, test_size=500")
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert pictures(notebook) == 6
    assert "of 500 wrong" in printed(notebook)
    assert json.loads((tmp_path / "runs" / "notebook" / "result.json").read_text())["world_size"] == 2
