"""The queue of trials: an Optuna study per campaign, shared by any number of workers and machines.

A trial is claimed by one worker; the trial of a worker that died goes back to the queue, at once where the worker's
process can be looked up, else when its heartbeat has stopped for long. The records in ``results/`` say what is
finished: the queue only says what is being worked on.
"""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.harness.experiment import UserError
from experiments.harness.record import TrialSpec

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

HEARTBEAT_SEC = 10
GRACE_SEC = 40
"""A worker that has been silent for so long is dead, and its trial is claimed by another."""


def open_study(storage: str, spec: TrialSpec) -> Study:
    """The study of the campaign that ``spec`` belongs to, created at the first call.

    Args:
        storage: any Optuna storage URL: ``sqlite:///runs/queue.db``, ``postgresql://…``.
        spec: any trial of the campaign.

    Raises:
        UserError: if the storage cannot be opened.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    name = f"{spec.experiment}-v{spec.version}-{spec.scale}-{spec.campaign_id}"
    try:
        if storage.startswith("sqlite:///"):
            Path(storage.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return optuna.create_study(storage=_backend(storage), study_name=name, load_if_exists=True)
    except (OSError, ImportError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
        reason = str(cause).strip().splitlines()[0]
        raise UserError(
            f"the queue {storage} cannot be opened ({reason}); choose a writable folder with --runs, or give --storage "
            "a database that Optuna can reach, such as sqlite:///queue.db or postgresql://user@host/name"
        ) from error


def _backend(storage: str) -> Any:
    import optuna
    import sqlalchemy

    sqlite = storage.startswith("sqlite")
    backend = optuna.storages.RDBStorage(
        storage,
        heartbeat_interval=HEARTBEAT_SEC,
        grace_period=GRACE_SEC,
        heartbeat_stale_trial_callback=_return_to_queue,
        engine_kwargs={"connect_args": {"timeout": 60}} if sqlite else {},
    )
    if sqlite:
        # SQLite ignores the row lock under which Optuna claims a trial, so that two workers could claim the same one:
        # take the lock of the whole file before the claim reads.
        sqlalchemy.event.listen(backend.engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))
    return backend


def enqueue(study: Study, specs: Collection[TrialSpec], done: Collection[str]) -> None:
    """Make the queue hold exactly the trials that are wanted, not finished, and not being worked on.

    Args:
        study: the campaign's queue.
        specs: the whole plan, in order.
        done: ids of trials that have a record.
    """
    import optuna
    from optuna.trial import TrialState

    _return_trials_of_the_dead(study)
    wanted = {spec.trial_id: spec for spec in specs if spec.trial_id not in done}
    active = set()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING)):
        trial_id = trial.user_attrs.get("trial_id")
        if trial.state == TrialState.WAITING and (trial_id not in wanted or trial_id in active):
            with suppress(optuna.exceptions.UpdateFinishedTrialError):  # study.tell() refuses what nobody has claimed
                study._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
        else:
            active.add(trial_id)
    for trial_id, spec in wanted.items():
        if trial_id not in active:
            _put(study, trial_id, spec.model_dump_json())


def _put(study: Study, trial_id: str, spec_json: str) -> None:
    study.enqueue_trial({}, user_attrs={"trial_id": trial_id, "spec": spec_json})


def _return_to_queue(study: Study, trial: FrozenTrial) -> None:
    if "trial_id" in trial.user_attrs:
        _put(study, trial.user_attrs["trial_id"], trial.user_attrs["spec"])


def _return_trials_of_the_dead(study: Study) -> None:
    """Fail the trials of workers that died, and put them back into the queue."""
    import optuna
    from optuna.trial import TrialState

    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    if not any(_worker_lives_here(trial) for trial in running):  # where this machine slept, its heartbeats are late
        optuna.storages.fail_stale_trials(study)
    for trial in running:
        if _worker_is_dead(trial):
            with suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):  # another process was faster
                study.tell(trial.number, state=TrialState.FAIL)
                _return_to_queue(study, trial)


def _worker_is_dead(trial: FrozenTrial) -> bool:
    """Certain for a process of this machine; of others, only that one died in the moment of its claim."""
    import psutil

    worker = trial.user_attrs.get("worker")
    if worker is None:
        claimed = trial.datetime_start
        return claimed is not None and datetime.now() - claimed > timedelta(seconds=GRACE_SEC)
    if worker["machine"] != _machine():
        return False
    try:
        return bool(psutil.Process(worker["pid"]).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _worker_lives_here(trial: FrozenTrial) -> bool:
    worker = trial.user_attrs.get("worker")
    return worker is not None and worker["machine"] == _machine() and not _worker_is_dead(trial)


def _machine() -> str:
    """Where a process id means something: the host and, where there are such, the namespace of process ids."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def work(study: Study, run: Callable[[TrialSpec], bool], stop: Callable[[], bool]) -> None:
    """Claim and run trials until the queue is empty and nobody else's trial can come back to it.

    Args:
        study: the campaign's queue.
        run: runs one trial; False if it stopped early and must be taken up again later.
        stop: asked before each claim.
    """
    import optuna
    from optuna.trial import TrialState

    preempted: list[tuple[str, str]] = []

    def objective(trial: Trial) -> float:
        trial.set_user_attr("worker", {"machine": _machine(), "pid": os.getpid()})
        trial_id = trial.user_attrs.get("trial_id")
        if trial_id is None or _claimed_before(study, trial):
            raise optuna.TrialPruned  # an empty queue makes Optuna sample a trial of its own; a double is left alone
        began = time.monotonic()
        if not run(TrialSpec.model_validate(json.loads(trial.user_attrs["spec"]))):
            preempted.append((trial_id, trial.user_attrs["spec"]))
            raise optuna.TrialPruned
        return time.monotonic() - began

    while not stop():
        _return_trials_of_the_dead(study)
        states = {t.state for t in study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))}
        if TrialState.WAITING in states:
            study.optimize(objective, n_trials=1)
            while preempted:  # only now, since a second worker leaves alone what the first one still runs
                _put(study, *preempted.pop())
        elif TrialState.RUNNING in states:
            time.sleep(2)
        else:
            return


def _claimed_before(study: Study, trial: Trial) -> bool:
    """Whether another worker runs the same trial (two machines may enqueue it at the same moment)."""
    from optuna.trial import TrialState

    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return any(
        t.user_attrs.get("trial_id") == trial.user_attrs["trial_id"] and t.number < trial.number for t in running
    )
