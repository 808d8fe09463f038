"""The contract of the queue: every trial is claimed once, and none is lost with its worker."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from collections import Counter

import pytest
from optuna.trial import TrialState

from experiments.harness import queue
from experiments.harness.experiment import UserError
from experiments.harness.queue import enqueue, open_study, work
from experiments.harness.record import TrialSpec

SPAWN = multiprocessing.get_context("spawn")


def plan(count, **settings):
    return [
        TrialSpec(experiment="x", version=1, scale="smoke", seed=seed, factors={}, settings=settings)
        for seed in range(count)
    ]


@pytest.fixture
def storage(tmp_path):
    return f"sqlite:///{tmp_path / 'runs' / 'queue.db'}"


def opened(storage, specs, done=()):
    study = open_study(storage, specs[0])
    enqueue(study, specs, set(done))
    return study


def states(study):
    return Counter(t.state for t in study.get_trials() if "trial_id" in t.user_attrs)


def drain(study):
    """Run everything at once; seeds in the order in which they were claimed."""
    claimed = []
    work(study, lambda spec: claimed.append(spec.seed) or True, lambda: False)
    return claimed


def test_trials_are_run_in_the_order_of_the_plan_and_an_empty_queue_returns(storage):
    specs = plan(4)
    study = opened(storage, specs)
    claimed = []
    work(study, lambda spec: claimed.append(spec) or True, lambda: False)
    assert claimed == specs
    assert drain(study) == []


def test_nothing_is_enqueued_twice_and_nothing_that_is_done(storage):
    specs = plan(4)
    opened(storage, specs)
    study = opened(storage, specs, done=[specs[1].trial_id])
    assert drain(study) == [0, 2, 3]


def test_waiting_trials_outside_the_plan_are_dropped(storage):
    opened(storage, plan(4))
    assert drain(opened(storage, plan(2))) == [0, 1]


def test_campaigns_do_not_mix(storage):
    opened(storage, plan(2, steps=1))
    assert drain(opened(storage, plan(3, steps=2))) == [0, 1, 2]
    assert drain(open_study(storage, plan(1, steps=1)[0])) == [0, 1]


def test_a_worker_that_is_told_to_stop_claims_nothing_more(storage):
    study = opened(storage, plan(3))
    claimed = []
    work(study, lambda spec: claimed.append(spec.seed) or True, lambda: bool(claimed))
    assert claimed == [0]
    assert states(study)[TrialState.WAITING] == 2


def test_a_preempted_trial_returns_to_the_queue(storage):
    specs = plan(2)
    study = opened(storage, specs)
    claimed = []
    work(study, lambda spec: bool(claimed.append(spec.seed)), lambda: bool(claimed))
    assert claimed == [0] and states(study)[TrialState.WAITING] == 2
    assert sorted(drain(study)) == [0, 1]


def test_a_preempted_trial_returns_only_after_its_worker_has_let_it_go(storage, monkeypatch):
    """Else a second worker would see it twice, and leave alone both."""
    study = opened(storage, plan(1))
    running = []
    put = queue._put

    def watched(study, *arguments):
        running.append(states(study)[TrialState.RUNNING])
        put(study, *arguments)

    monkeypatch.setattr(queue, "_put", watched)
    work(study, lambda spec: False, lambda: bool(running))
    assert running == [0]


def test_a_trial_that_was_enqueued_twice_at_one_moment_is_run_once_at_a_time(storage):
    specs = plan(1)
    study = opened(storage, specs)
    queue._put(study, specs[0].trial_id, specs[0].model_dump_json())
    claimed = []

    def run(spec):
        claimed.append(spec.seed)
        if len(claimed) == 1:
            drain_other = open_study(storage, specs[0])
            work(drain_other, lambda spec: claimed.append(spec.seed) or True, lambda: not _waiting(drain_other))
        return True

    work(study, run, lambda: False)
    assert claimed == [0]


def _waiting(study):
    return states(study)[TrialState.WAITING]


def _claim(storage, path, gate, count):
    specs = plan(count)
    study = open_study(storage, specs[0])
    gate.wait()

    def run(spec):
        with path.open("a") as file:
            file.write(f"{spec.seed}\n")
        return True

    work(study, run, lambda: False)


def test_concurrent_processes_claim_each_trial_once(storage, tmp_path):
    """SQLite ignores the row lock under which Optuna claims: without a lock of ours, several per run are doubled."""
    count, workers = 30, 3
    opened(storage, plan(count))
    gate = SPAWN.Barrier(workers)
    processes = [
        SPAWN.Process(target=_claim, args=(storage, tmp_path / "claimed", gate, count), daemon=True)
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * workers
    assert Counter((tmp_path / "claimed").read_text().split()) == {str(seed): 1 for seed in range(count)}


def _hang(storage, claimed):
    study = open_study(storage, plan(1)[0])
    work(study, lambda spec: claimed.set() or time.sleep(600) or True, lambda: False)


@pytest.fixture
def dead_worker(storage):
    """A queue of two trials, and a worker that was killed in the first."""
    opened(storage, plan(2))
    claimed = SPAWN.Event()
    process = SPAWN.Process(target=_hang, args=(storage, claimed), daemon=True)
    process.start()
    assert claimed.wait(60)
    assert states(open_study(storage, plan(1)[0]))[TrialState.RUNNING] == 1
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_the_next_call_takes_over_from_a_dead_worker_of_this_machine_without_waiting(storage, dead_worker):
    began = time.monotonic()
    assert sorted(drain(opened(storage, plan(2)))) == [0, 1]
    assert time.monotonic() - began < queue.GRACE_SEC / 2


def test_a_sibling_takes_over_from_a_dead_worker_without_waiting(storage, dead_worker):
    assert sorted(drain(open_study(storage, plan(2)[0]))) == [0, 1]


def test_a_silent_worker_of_another_machine_loses_its_trial_after_the_grace_period(storage, dead_worker, monkeypatch):
    monkeypatch.setattr(queue, "_machine", lambda: "elsewhere")
    assert states(opened(storage, plan(2)))[TrialState.RUNNING] == 1, "it may still be alive"
    monkeypatch.setattr(queue, "GRACE_SEC", 1)
    time.sleep(2.1)  # SQLite's clock counts whole seconds
    assert sorted(drain(opened(storage, plan(2)))) == [0, 1]


def test_a_worker_of_this_machine_whose_heartbeat_is_late_keeps_its_trial(storage, monkeypatch):
    """As after a sleep of the machine."""
    monkeypatch.setattr(queue, "GRACE_SEC", 1)
    study = opened(storage, plan(2))
    trial = study.ask()
    trial.set_user_attr("worker", {"machine": queue._machine(), "pid": os.getpid()})
    study._storage.record_heartbeat(trial._trial_id)
    time.sleep(2.1)  # SQLite's clock counts whole seconds
    assert states(opened(storage, plan(2)))[TrialState.RUNNING] == 1


def test_a_worker_that_died_in_the_moment_of_its_claim_does_not_block_the_queue(storage, monkeypatch):
    """It has left neither its name nor a heartbeat."""
    study = opened(storage, plan(2))
    study.ask()
    assert states(opened(storage, plan(2)))[TrialState.RUNNING] == 1
    monkeypatch.setattr(queue, "GRACE_SEC", 0.2)
    time.sleep(0.3)
    assert sorted(drain(opened(storage, plan(2)))) == [0, 1]


def test_the_trial_of_a_worker_that_lives_is_left_to_it(storage):
    specs = plan(2)
    study, release = opened(storage, specs), threading.Event()
    claimed, began = [], threading.Event()

    def slow(spec):
        claimed.append(spec.seed)
        began.set()
        return release.wait(60)

    thread = threading.Thread(target=work, args=(study, slow, release.is_set), daemon=True)
    thread.start()
    assert began.wait(60)
    other = opened(storage, specs)
    assert states(other) == {TrialState.RUNNING: 1, TrialState.WAITING: 1}
    taken = []
    work(other, lambda spec: taken.append(spec.seed) or True, lambda: bool(taken))
    release.set()
    thread.join()
    assert (claimed, taken) == ([0], [1])


def test_a_queue_that_cannot_be_opened_is_one_line_with_the_fix(tmp_path):
    spec = plan(1)[0]
    broken = tmp_path / "queue.db"
    broken.write_text("this is not a database " * 100)
    for storage in ("sqlite:////dev/null/x/queue.db", f"sqlite:///{broken}", "foo://x", "nonsense"):
        with pytest.raises(UserError, match=r"cannot be opened \(.+\); .*--runs.*--storage") as caught:
            open_study(storage, spec)
        assert "\n" not in str(caught.value)


def test_the_queue_survives_a_second_opening(storage, tmp_path):
    opened(storage, plan(1))
    with sqlite3.connect(tmp_path / "runs" / "queue.db") as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    assert drain(opened(storage, plan(1))) == [0]
