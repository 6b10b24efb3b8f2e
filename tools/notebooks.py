"""The notebooks in `examples/`, run from top to bottom in a fresh kernel.

`make notebooks` runs them and stores what they print. A cell with the tag `varies` prints what differs between machines and runs, such as
losses: its output is stored, too, and not compared.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
VARIES = "varies"


def execute(path: Path, folder: Path, probe: str = "", timeout: int = 300) -> tuple[Any, str]:
    """Run a notebook.

    Args:
        path (`Path`): The notebook; it stays as it is.
        folder (`Path`): Where it runs, and writes to.
        probe (`str`, *optional*): Code to run after the last cell.
        timeout (`int`, *optional*, defaults to 300): Seconds that a cell may take.

    Returns:
        `tuple[NotebookNode, str]`: The notebook with its outputs, and what `probe` printed.

    Raises:
        `CellExecutionError`: a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    count = len(notebook.cells)
    if probe:
        notebook.cells.append(nbformat.v4.new_code_cell(probe))
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env={**os.environ, "HF_HUB_OFFLINE": "1"})  # none of them may need the network
    probed = "".join(output.text for cell in tidied(notebook).cells[count:] for output in cell.outputs)
    del notebook.cells[count:]
    return notebook, probed


def tidied(notebook: Any) -> Any:
    """Without what says more of the machine than of the notebook: times, versions of the kernel, warnings and progress bars."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        if cell.cell_type == "code":
            cell.outputs = _joined([output for output in cell.outputs if output.get("name") != "stderr"])
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """One output for what was printed in pieces; how many there are depends on the clock."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def printed(cell: Any) -> list[Any]:
    """What a cell printed, as far as it is the same everywhere."""
    if cell.cell_type != "code" or VARIES in cell.metadata.get("tags", []):
        return []
    return [output.get("text") or output.get("data") for output in cell.outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(EXAMPLES.glob("*.ipynb")))
    for path in parser.parse_args().notebooks:
        with tempfile.TemporaryDirectory() as folder:
            notebook, _ = execute(path, Path(folder))
        nbformat.write(notebook, path)
        print(f"{path.name}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells ran")


if __name__ == "__main__":
    main()
