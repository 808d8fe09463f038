"""Where and with what a trial ran: commit, package versions, hardware."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from experiments.harness.record import Scalar

ROOT = Path(__file__).resolve().parents[2]

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "optuna", "wandb", "safetensors")
_CODE = ("forge", "experiments", "pyproject.toml", "constraints.txt")


def git_state() -> tuple[str | None, bool | None]:
    """Commit and whether the code differs from it; (None, None) outside a git checkout, None for what git won't say."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None, None
    changes = _git("status", "--porcelain", "--", *_CODE)
    return commit, None if changes is None else bool(changes)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change an outcome."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, Scalar]:
    """Device, processor, cores that this process may use, threads, memory."""
    import torch

    facts: dict[str, Scalar] = {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
