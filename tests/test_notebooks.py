"""The notebooks in `examples/notebooks` run from end to end; their outputs are of their code."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


def cells_of_code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: Any) -> list[list[tuple]]:
    """What the cells give, without its text: streams by name, values by how they are shown."""
    outputs = [cell.outputs for cell in cells_of_code(notebook)]
    return [[(o.get("name"), *sorted(o.get("data", ()))) for o in each] for each in outputs]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_of_one_run_and_short(path):
    assert path.stat().st_size < 50_000  # with one chart
    cells = cells_of_code(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for output in [output for cell in cells for output in cell.outputs]:
        text = output.get("text") or output["data"]["text/plain"]
        assert len(text.splitlines()) <= 24, text
        assert not re.search(r"/(tmp|root|home|work)/|Warning|\x1b", str(output)), text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_runs_again(path, tiny_folder, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("CHAINLORA_MODEL", str(tiny_folder))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    for name in ("dates", "times"):
        shutil.copytree(ROOT / "examples" / name, tmp_path / name)
    (tmp_path / "notebooks").mkdir()
    place = {"metadata": {"path": str(tmp_path / "notebooks")}}
    first, again = read(path), read(path)
    for notebook in (first, again):
        NotebookClient(notebook, resources=place, timeout=600, coalesce_streams=True).execute()
    assert kinds(first) == kinds(read(path))  # the outputs that are committed are of this code
