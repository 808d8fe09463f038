"""Python in other processes: on one thread, without a GPU, and stopped when its time is over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STOPPING_SEC = 60
"""``torchrun`` ends its workers, which are in sessions of their own, when it is asked to end; not when it is killed."""


def run_python(*arguments: object, timeout_sec: float = 600) -> subprocess.CompletedProcess[str]:
    """Run Python from the root of the repository; ``subprocess.TimeoutExpired`` once it has been stopped for time."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            out, err = process.communicate(timeout=timeout_sec)
        except BaseException:
            process.terminate()
            try:
                process.wait(STOPPING_SEC)
            finally:
                process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def torchrun(*arguments: object, timeout_sec: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a script or ``-m module`` as two processes that talk over a free port."""
    launcher = ("-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return run_python(*launcher, *arguments, timeout_sec=timeout_sec)


def succeeded(done: subprocess.CompletedProcess[str]) -> None:
    """Assert that it ended well, with what it said if not."""
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-3000:]}"
