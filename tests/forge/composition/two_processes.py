"""Runs cells of the matrix as one of two gloo processes; started once for all of them by ``torch.distributed.run``.

``python -m tests.forge.composition.two_processes MODELS FOLDER`` takes the ids of the cells from ``FOLDER/cells.json``;
each process writes one line a cell to ``FOLDER/outcomes-RANK.jsonl``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.forge.composition.cells import CELLS, quiet
from tests.forge.composition.invariants import Bench, check


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def outcome(cell_id: str, bench: Bench, rank: int) -> dict[str, Any]:
    """Run one cell: what it left, or why it failed."""
    try:
        run = check(CELLS[cell_id], bench)
    except Exception:  # noqa: BLE001 (whatever it is fails the test of this cell, and of this cell alone)
        return {"cell": cell_id, "error": traceback.format_exc()}
    path = bench.folder / f"{cell_id}.safetensors"
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in run.weights.items()}, path)
    result = {"digest": digest(run.weights | run.averages), "weights": str(path), "norms": run.norms}
    return {"cell": cell_id, "error": None} | result


def main(models: Path, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    bench = Bench(models, folder)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=300))
    with open(folder / f"outcomes-{rank}.jsonl", "w") as file, quiet():
        for cell_id in json.loads((folder / "cells.json").read_text()):
            print(json.dumps(outcome(cell_id, bench, rank)), file=file, flush=True)
            torch.distributed.barrier()
            if rank == 0:
                shutil.rmtree(folder / "runs", ignore_errors=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
