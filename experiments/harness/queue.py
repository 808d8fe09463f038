"""The queue of trials: an Optuna study per campaign, shared by any number of workers and machines.

A trial is claimed by one worker; heartbeats return the trial of a worker that died to the queue. The records in
``results/`` say what is finished: the queue only says what is being worked on.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.harness.record import TrialSpec

if TYPE_CHECKING:
    from optuna import Study, Trial

HEARTBEAT_SEC = 10
GRACE_SEC = 40
"""A worker that has been silent for so long is dead, and its trial is claimed by another."""


def open_study(storage: str, spec: TrialSpec) -> Study:
    """The study of the campaign that ``spec`` belongs to, created at the first call.

    Args:
        storage: any Optuna storage URL: ``sqlite:///runs/queue.db``, ``postgresql://…``.
        spec: any trial of the campaign.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    if storage.startswith("sqlite:///"):
        Path(storage.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.RDBStorage(
        storage,
        heartbeat_interval=HEARTBEAT_SEC,
        grace_period=GRACE_SEC,
        heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
        engine_kwargs={"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {},
    )
    name = f"{spec.experiment}-v{spec.version}-{spec.scale}-{spec.campaign_id}"
    return optuna.create_study(storage=backend, study_name=name, load_if_exists=True)


def enqueue(study: Study, specs: Collection[TrialSpec], done: Collection[str]) -> None:
    """Make the queue hold exactly the trials that are wanted, not finished, and not being worked on.

    Args:
        study: the campaign's queue.
        specs: the whole plan, in order.
        done: ids of trials that have a record.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.storages.fail_stale_trials(study)
    wanted = {spec.trial_id: spec for spec in specs if spec.trial_id not in done}
    active = set()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING)):
        trial_id = trial.user_attrs.get("trial_id")
        if trial.state == TrialState.WAITING and (trial_id not in wanted or trial_id in active):
            study.tell(trial.number, state=TrialState.FAIL)
        else:
            active.add(trial_id)
    for trial_id, spec in wanted.items():
        if trial_id not in active:
            _put(study, trial_id, spec.model_dump_json())


def _put(study: Study, trial_id: str, spec_json: str) -> None:
    study.enqueue_trial({}, user_attrs={"trial_id": trial_id, "spec": spec_json})


def work(study: Study, run: Callable[[TrialSpec], bool], stop: Callable[[], bool]) -> None:
    """Claim and run trials until the queue is empty and nobody else's trial can come back to it.

    Args:
        study: the campaign's queue.
        run: runs one trial; False if it stopped early and must be taken up again later.
        stop: asked before each claim.
    """
    import optuna
    from optuna.trial import TrialState

    def objective(trial: Trial) -> float:
        trial_id = trial.user_attrs.get("trial_id")
        if trial_id is None or _claimed_before(study, trial):
            raise optuna.TrialPruned  # an empty queue makes Optuna sample a trial of its own; a double is left alone
        began = time.monotonic()
        if not run(TrialSpec.model_validate(json.loads(trial.user_attrs["spec"]))):
            _put(study, trial_id, trial.user_attrs["spec"])
            raise optuna.TrialPruned
        return time.monotonic() - began

    while not stop():
        optuna.storages.fail_stale_trials(study)
        states = {t.state for t in study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))}
        if TrialState.WAITING in states:
            study.optimize(objective, n_trials=1)
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
