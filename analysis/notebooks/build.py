"""Executes the notebooks from their sources: ``python -m analysis.notebooks.build [name]``.

Serves every section of THEORY.md. A source is a Python file in jupytext's percent format beside this module; the
executed ``.ipynb`` is committed and holds nothing that changes from one run to the next (no times, no random ids).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent


def sources() -> dict[str, Path]:
    """Notebook sources by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.py")) if path.stem not in ("__init__", "build")}


def build(source: Path, workdir: Path = ROOT) -> str:
    """Execute a source and return the notebook as JSON text.

    Args:
        source: file in jupytext's percent format.
        workdir: folder in which it runs; its ``results/`` are the evidence that is shown.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = jupytext.read(source, fmt="py:percent")
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(workdir)}},
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"})
    for index, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{index}", {}
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return str(nbformat.writes(notebook, version=4)).rstrip("\n") + "\n"  # type: ignore[no-untyped-call]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: executes one notebook or all."""
    parser = argparse.ArgumentParser(prog="python -m analysis.notebooks.build", description="Execute the notebooks.")
    parser.add_argument("name", nargs="?", choices=list(sources()), help="name of one notebook; all by default")
    options = parser.parse_args(argv)
    for name, source in sources().items():
        if options.name in (None, name):
            path = source.with_suffix(".ipynb")
            path.write_text(build(source), encoding="utf-8", newline="\n")
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
