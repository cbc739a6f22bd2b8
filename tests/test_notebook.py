"""examples/flash_kda.ipynb: it runs from top to bottom, says what its text promises, and is stored with its outputs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = ROOT / "examples" / "flash_kda.ipynb"
SKIPPED = "skip-execution"  # nbclient's own name: the cell that installs


def code_cells(notebook) -> list:
    return [c for c in notebook.cells if c.cell_type == "code" and SKIPPED not in c.metadata.get("tags", [])]


def printed(notebook) -> str:
    outputs = [o for cell in code_cells(notebook) for o in cell.outputs]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def assert_shows_what_it_promises(notebook) -> None:
    cells = code_cells(notebook)
    assert [o for cell in cells for o in cell.outputs if o.output_type == "error"] == []
    assert any("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs), "no plot"
    text = printed(notebook)
    for line in (
        r"^flash_kda +version 1, _flash_kda_\w+ ",
        r"^files +as metadata\.json lists them$",
        r"^relative error: output \d\.\de-\d+, state \d\.\de-\d+$",
        r"^transformers, no kernels +\d",
        r"^Flash KDA +\d",
        r"^without kernels: \d",
        r"'chunk_kda': 'chunk_kimi_delta_attention'",
        r"^with kernels:    \d",
        r"^None$",  # put back
    ):
        assert re.search(line, text, re.MULTILINE), line


def test_it_runs_from_top_to_bottom(kernel, tmp_path: Path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert_shows_what_it_promises(notebook)


def test_it_is_stored_with_its_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [c.execution_count for c in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert_shows_what_it_promises(notebook)
    assert "/work/" not in printed(notebook) and "/home/" not in printed(notebook)


def test_it_installs_what_the_readme_says():
    (cell,) = (c for c in nbformat.read(NOTEBOOK, as_version=4).cells if SKIPPED in c.metadata.get("tags", []))
    (pair,) = re.findall(r'^pip install ("kernels.*") accelerate$', (ROOT / "README.md").read_text(), re.MULTILINE)
    assert pair in cell.source
