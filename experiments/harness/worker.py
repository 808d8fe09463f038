"""A worker process: claims trials, runs them, writes their records, and stops gracefully when asked to."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType

from experiments.harness import provenance
from experiments.harness.experiment import WRONG_INPUT, Experiment, Preempted, UserError, load_experiment
from experiments.harness.queue import open_study, work
from experiments.harness.record import Measurements, Status, TrialRecord, TrialSpec, record_path, write_record
from experiments.harness.tracking import WandbMode, wandb_run

PROGRESS_FILE = "progress.json"
_FILE_ERRORS = ("(os error ", "inline_container.cc")
"""What errors of a file say where they are no ``OSError``: those of safetensors, and of torch."""


@dataclass(frozen=True)
class WorkerConfig:
    """What the parent tells a worker; everything is picklable."""

    specs: tuple[TrialSpec, ...]
    """The whole plan."""
    storage: str
    results: Path
    runs: Path
    wandb: WandbMode
    deadline: float | None
    """Unix time at which to checkpoint and stop."""
    threads: int | None
    parent: int
    """Process id; a worker whose parent is gone stops."""
    stopping: Event
    """Set when the parent was asked to stop, which a signal to it alone does not tell the workers."""


@dataclass
class _StopSignal:
    """Set by the first Ctrl-C (or SIGTERM); the second one interrupts at once."""

    requested: bool = False

    def handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@dataclass
class WorkerContext:
    """The ``TrialContext`` of a trial that runs in a worker."""

    work_dir: Path
    run_id: str | None
    stop: Callable[[], bool]
    _last_report: float = field(default=0.0, init=False)

    def report(self, step: int, total: int, **figures: float | str | None) -> None:
        """Write ``progress.json`` at most twice a second."""
        now = time.monotonic()
        if now - self._last_report < 0.5 and step < total:
            return
        self._last_report = now
        temporary = self.work_dir / f".{PROGRESS_FILE}"
        temporary.write_text(json.dumps({"step": step, "total": total, "time": time.time(), **figures}))
        os.replace(temporary, self.work_dir / PROGRESS_FILE)

    def should_stop(self) -> bool:
        """Whether to checkpoint and stop."""
        return self.stop()

    def wandb_run_id(self) -> str | None:
        """Id of the trial's W&B run."""
        return self.run_id


def run_worker(config: WorkerConfig) -> None:
    """Entry point of a worker process."""
    stop = _StopSignal()
    signal.signal(signal.SIGINT, stop.handle)
    signal.signal(signal.SIGTERM, stop.handle)

    def should_stop() -> bool:
        overdue = config.deadline is not None and time.time() >= config.deadline
        return stop.requested or config.stopping.is_set() or overdue or os.getppid() != config.parent

    import torch

    _quieten_libraries()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    commit = provenance.git_state()  # of the code that this process has; a later commit is not what it runs
    experiment = load_experiment(config.specs[0].experiment)
    study = open_study(config.storage, config.specs[0])
    try:
        work(study, lambda spec: _run_and_record(experiment, spec, config, commit, should_stop), should_stop)
    except UserError as error:  # wrong input that only a trial could notice is no outcome of the trial
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    except OSError as error:  # nor is a full disk or a hub that does not answer: the trial has no record and runs again
        what = " ".join(str(error).split())
        print(
            f"error: a file or the network failed ({what}); make room or mend the connection, and run it again",
            file=sys.stderr,
        )
        sys.exit(WRONG_INPUT)


def _quieten_libraries() -> None:
    """Leave the terminal to the progress display."""
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    for name in ("bitsandbytes", "forge.monitor"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _run_and_record(
    experiment: Experiment,
    spec: TrialSpec,
    config: WorkerConfig,
    commit: tuple[str | None, bool | None],
    should_stop: Callable[[], bool],
) -> bool:
    """Run one trial and write its record; False if it stopped early."""
    if record_path(config.results, spec).exists():
        return True
    work_dir = config.runs / spec.experiment / spec.trial_id
    work_dir.mkdir(parents=True, exist_ok=True)
    started = datetime.now(UTC)
    run_id: str | None = None
    try:
        with wandb_run(spec, config.wandb, config.runs / "wandb") as run_id:
            context = WorkerContext(work_dir, run_id, should_stop)
            context.report(0, 1, phase="loading")
            measurements = experiment.run_trial(spec, context)
        status, error = _judge(measurements)
    except Preempted:
        return False
    except (UserError, OSError):
        raise
    except Exception as exception:  # whatever else a trial dies of becomes its record
        if any(sign in str(exception) for sign in _FILE_ERRORS):
            raise OSError(str(exception)) from exception
        measurements = Measurements()
        status, error = _failure(exception)
    record = TrialRecord(
        trial_id=spec.trial_id,
        spec=spec,
        plan=[planned.trial_id for planned in config.specs],
        claims={claim.id: claim.digest for claim in experiment.claims},
        status=status,
        error=error,
        observations=measurements.observations,
        examples=measurements.examples,
        checks=measurements.checks,
        seconds={name: round(value, 3) for name, value in measurements.seconds.items()},
        tokens=measurements.tokens,
        memory_bytes=measurements.memory_bytes,
        digests=measurements.digests,
        git_commit=commit[0],
        git_dirty=commit[1],
        packages=provenance.package_versions(),
        hardware=provenance.hardware(),
        wandb_run_id=run_id,
        started=started.isoformat(timespec="seconds"),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_record(config.results, record)
    shutil.rmtree(work_dir)
    return True


def _judge(measurements: Measurements) -> tuple[Status, str | None]:
    failed = [check for check in measurements.checks if not check.passed]
    if measurements.diverged is not None:
        return "diverged", measurements.diverged
    if failed:
        detail = "; ".join(f"{c.name}: expected {c.expected}, observed {c.observed}" for c in failed)
        return "crashed", f"manipulation check failed: {detail}"
    return "ok", None


def _failure(exception: Exception) -> tuple[Status, str]:
    import torch

    text = "".join(traceback.format_exception(exception)).strip()
    out_of_memory = isinstance(exception, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
    return ("oom" if out_of_memory else "crashed"), text
