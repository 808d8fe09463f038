"""The command line as a user runs it, the same in this process, and campaigns small enough for a test."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "experiments.run"]

SMALL = ["ema_ablation", "--scale", "smoke", "--wandb", "disabled", "--seeds", "1", "--schedules", "constant"]
SMALL += ["--late-evaluations", "2", "--length.steps", "2", "--length.late-evaluations", "1"]
LONG = [*SMALL, "--steps", "120"]
"""Two trials; the first trains long enough (seconds) to be interrupted in the middle, the second hardly at all."""


def environment(**changes: str) -> dict[str, str]:
    """Ours, without W&B settings of the user's, without a network, and on one core."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def on_one_core() -> None:
    """In the child, before it starts: a tiny model is slower on two cores than on one, above all on a busy machine."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``cli(*arguments, **environment)`` runs the command line to its end."""

    def run(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment(**changes),
            preexec_fn=None if "--workers" in arguments else on_one_core,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    return run


@pytest.fixture
def start_cli(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command line in a process group of its own, which is killed when the test ends."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        log = (tmp_path / f"log-{len(started)}").open("w")
        command = [*COMMAND, *map(str, arguments)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            preexec_fn=on_one_core,
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.wait()


@pytest.fixture(scope="session")
def wait_for_step() -> Callable[..., None]:
    """Waits until a running trial reports that it trains, then until it has taken some steps."""

    def wait(runs: Path, process: subprocess.Popen[str], step: int = 1) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before it could be interrupted"
            for path in runs.glob("ema_ablation/*/progress.json"):
                progress = json.loads(path.read_text())
                if progress["step"] >= step and progress.get("phase") in ("training", "evaluation"):
                    return
            time.sleep(0.02)
        raise AssertionError("no trial began to train")

    return wait


@pytest.fixture
def inline_cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """``inline_cli(*arguments)``: the command line with its worker in this process, so that it can be tampered with.

    Records go to ``tmp_path / "results"``; returns the exit code.
    """
    import torch
    import transformers.trainer  # noqa: F401  slow to import: not at the cost of a test's time budget

    import experiments.run

    class Inline:
        def __init__(self, target: Callable[..., None], args: tuple[Any]) -> None:
            self._target = target
            self.exitcode: Any = 0
            self._config = dataclasses.replace(args[0], parent=os.getppid(), threads=1)

        def start(self) -> None:
            try:
                self._target(self._config)
            except SystemExit as exit:
                self.exitcode = exit.code

        def is_alive(self) -> bool:
            return False

        def join(self) -> None:
            return None

    monkeypatch.setattr(
        experiments.run,
        "multiprocessing",
        SimpleNamespace(get_context=lambda _: SimpleNamespace(Process=Inline, Event=threading.Event)),
    )
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield lambda *arguments: experiments.run.main(
        [*map(str, arguments), "--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    )
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def read_all() -> Callable[[Path], dict[str, dict[str, Any]]]:
    """Trial id → record as JSON, of everything below a results folder; fails where a file is not a valid record."""
    from experiments.harness.record import read_records

    def read(results: Path) -> dict[str, dict[str, Any]]:
        records, problems = read_records(results)
        assert not problems
        return {record.trial_id: record.model_dump(mode="json") for record in records}

    return read


@dataclasses.dataclass(frozen=True)
class Finished:
    """A campaign that ran to its end without interruption, in fresh processes."""

    arguments: list[str]
    results: Path
    runs: Path
    process: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def finished(cli: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The campaign LONG, run once for all tests that look at it (they must not change it)."""
    folder = tmp_path_factory.mktemp("finished")
    places = ["--results", str(folder / "results"), "--runs", str(folder / "runs")]
    return Finished(LONG, folder / "results", folder / "runs", cli(*LONG, *places))


@pytest.fixture
def small() -> list[str]:
    """Arguments of a campaign of two short trials."""
    return [*SMALL, "--steps", "6"]


@pytest.fixture
def long() -> list[str]:
    """Arguments of a campaign whose first trial can be interrupted."""
    return list(LONG)
