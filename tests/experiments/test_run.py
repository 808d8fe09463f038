"""The main job from the command line: end to end, interrupted, killed, out of time, run again."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from experiments import run
from experiments.harness import worker


def observed(record):
    """What must not depend on interruptions: everything measured but clocks."""
    timeless = [row for row in record["observations"] if row["unit"] != "s"]
    rest = {k: record[k] for k in ("spec", "status", "examples", "checks", "tokens", "digests")}
    return {**rest, "observations": timeless}


def test_a_run_writes_a_valid_record_of_every_trial_and_prints_the_table(finished, read_all):
    assert finished.process.returncode == 0, finished.process.stderr
    records = read_all(finished.results)
    assert {r["spec"]["factors"]["track"] for r in records.values()} == {"main", "length"}
    for record in records.values():
        assert record["status"] == "ok" and record["error"] is None
        assert record["checks"] and all(check["passed"] for check in record["checks"])
        assert record["plan"] == [r["trial_id"] for r in sorted(records.values(), key=order)]
        assert record["claims"] and record["packages"]["torch"] and record["hardware"]["device"] == "cpu"
        assert set(record["seconds"]) == {"training", "evaluation", "overhead"}
        assert record["memory_bytes"]["parameters"] > 0 and len(record["digests"]["model"]) == 64
    out = finished.process.stdout
    assert "ema_optimal" in out and "2 of 2 planned trials succeeded" in out
    said = finished.process.stderr.splitlines()
    assert len(said) == 2 and all(line.endswith("finished") for line in said), "a library talks into the display"
    assert not list(finished.runs.glob("ema_ablation/*")), "work folders of finished trials are removed"


def order(record):
    return ("main", "length").index(record["spec"]["factors"]["track"])


def test_a_second_call_runs_nothing_and_prints_the_same_table(finished, cli):
    paths = sorted(finished.results.rglob("*.json"))
    before = [(p.stat().st_mtime_ns, p.stat().st_ino) for p in paths]
    again = cli(*finished.arguments, "--results", finished.results, "--runs", finished.results.parent / "no-runs")
    assert again.returncode == 0
    assert [(p.stat().st_mtime_ns, p.stat().st_ino) for p in paths] == before
    assert not (finished.results.parent / "no-runs").exists(), "a worker was started"
    assert (
        again.stdout[again.stdout.index("| track") :]
        == finished.process.stdout[finished.process.stdout.index("| track") :]
    )


def test_dry_run_prints_the_plan_and_writes_nothing(cli, tmp_path, small):
    done = cli(*small, "--dry-run", "--results", tmp_path / "results", "--runs", tmp_path / "runs")
    assert done.returncode == 0
    assert "0 of 2 trials have a record" in done.stdout and done.stdout.count("to do") == 2
    assert "under 1 min" in done.stdout and "tiny-random" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_what_the_records_took(finished, cli, read_all):
    done = cli(*finished.arguments, "--dry-run", "--results", finished.results)
    seconds = sum(sum(record["seconds"].values()) for record in read_all(finished.results).values())
    assert 0 < seconds < 120
    assert "2 of 2 trials have a record" in done.stdout
    assert f"those that have one took {seconds:.0f} s of worker-process time" in done.stdout
    assert "the rest takes" not in done.stdout


def test_dry_run_of_another_plan_does_not_call_the_cost_its_own(inline_cli, small, capsys):
    assert inline_cli(*small, "--dry-run") == 0
    assert "cost of the scale's own plan: under 1 min" in capsys.readouterr().out
    assert inline_cli("ema_ablation", "--scale", "smoke", "--dry-run") == 0
    assert "cost of the whole: under 1 min" in capsys.readouterr().out


def test_records_of_other_data_under_the_same_name_are_refused(inline_cli, small, tmp_path, capsys):
    data = tmp_path / "mine.jsonl"
    for word in ("sea", "sky"):
        data.write_text("".join(json.dumps({"text": f"The {word} {n}. " * 60}) + "\n" for n in range(30)))
        code = inline_cli(*small, "--dataset", data)
        assert code == {"sea": 0, "sky": 2}[word], capsys.readouterr().err
    assert "is not what it was when trial" in capsys.readouterr().err


def test_a_worker_that_was_killed_is_named(inline_cli, small, monkeypatch, capsys):
    monkeypatch.setattr(run, "_run_workers", lambda *_: {-9, 0})
    assert inline_cli(*small) == 3
    assert "a worker was killed (SIGKILL); where memory is too small" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"), [(59.6, "60 s"), (119, "119 s"), (600, "10 min"), (7_140, "119 min"), (12_240, "3.4 h")]
)
def test_durations_are_spelled_out(seconds, said):
    assert run._spell_out(seconds) == said


def test_an_interrupt_of_the_parent_alone_reaches_its_workers(long, start_cli, wait_for_step, tmp_path):
    process = start_cli(*long, "--results", tmp_path / "results", "--runs", tmp_path / "runs")
    wait_for_step(tmp_path / "runs", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=200) == 3, (tmp_path / "log-0").read_text()
    assert list((tmp_path / "runs").glob("ema_ablation/*/checkpoints/checkpoint-*/forge_complete"))


def test_ctrl_c_keeps_everything_and_the_next_call_ends_as_if_it_had_not_been(
    finished, long, start_cli, wait_for_step, cli, tmp_path, read_all
):
    places = ["--results", tmp_path / "results", "--runs", tmp_path / "runs"]
    process = start_cli(*long, *places)
    wait_for_step(tmp_path / "runs", process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=200) == 3, (tmp_path / "log-0").read_text()
    log = (tmp_path / "log-0").read_text()
    assert "Traceback" not in log and "the same command continues" in log
    assert read_all(tmp_path / "results") == {}
    assert not [p for p in (tmp_path / "results").rglob("*") if p.is_file()], "something half-written was left"
    assert list((tmp_path / "runs").glob("ema_ablation/*/checkpoints/checkpoint-*/forge_complete"))

    resumed = cli(*long, *places)
    assert resumed.returncode == 0, resumed.stderr
    expected, found = read_all(finished.results), read_all(tmp_path / "results")
    assert found.keys() == expected.keys()
    for trial_id, record in found.items():
        assert observed(record) == observed(expected[trial_id])


def test_kill_9_loses_only_what_was_being_run(long, start_cli, wait_for_step, cli, tmp_path, read_all):
    places = ["--results", tmp_path / "results", "--runs", tmp_path / "runs"]
    process = start_cli(*long, *places)
    wait_for_step(tmp_path / "runs", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = read_all(tmp_path / "results")
    assert len(before) < 2

    again = cli(*long, *places, "--workers", "2")
    assert again.returncode == 0, again.stderr
    assert "Traceback" not in again.stderr
    after = read_all(tmp_path / "results")
    assert len(after) == 2 and {r["status"] for r in after.values()} == {"ok"}
    assert all(after[trial_id] == record for trial_id, record in before.items()), "a finished trial was run again"


def expire(monkeypatch, looks):
    """Let an hour pass on the clock of the worker after so many looks at it, however fast the machine is."""
    looked = itertools.count(1)
    clock = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + (3_600 if next(looked) > looks else 0))
    monkeypatch.setattr(worker, "time", clock)


def test_the_time_budget_stops_early_and_the_next_call_continues(
    inline_cli, small, tmp_path, read_all, capsys, monkeypatch
):
    expire(monkeypatch, looks=40)
    assert inline_cli(*small, "--steps", "100000", "--time-budget", "30m") == 3
    assert "trials are left; the same command continues" in capsys.readouterr().err
    assert read_all(tmp_path / "results") == {}
    (checkpoint,) = (tmp_path / "runs").glob("ema_ablation/*/checkpoints/checkpoint-*/forge_complete")
    step = int(checkpoint.parent.name.rsplit("-", 1)[1])
    expire(monkeypatch, looks=40)
    assert inline_cli(*small, "--steps", "100000", "--time-budget", "30m") == 3
    (checkpoint,) = (tmp_path / "runs").glob("ema_ablation/*/checkpoints/checkpoint-*/forge_complete")
    assert int(checkpoint.parent.name.rsplit("-", 1)[1]) > step, "it started over instead of resuming"


def test_a_record_that_does_not_validate_is_named_and_left_alone(inline_cli, small, tmp_path, read_all, capsys):
    broken = tmp_path / "results/ema_ablation/v1/0123456789abcdef.json"
    broken.parent.mkdir(parents=True)
    broken.write_text('{"half": ')
    assert inline_cli(*small, "--length.steps", "2") == 0
    captured = capsys.readouterr()
    assert broken.name in "".join(captured.err.split()) and "left alone" in captured.err
    assert broken.read_text() == '{"half": '
    assert "2 of 2 planned trials succeeded" in captured.out


def test_a_trial_that_crashes_is_a_record_and_the_exit_code_says_so(inline_cli, small, monkeypatch, capsys):
    import experiments.harness.evaluation

    def explode(*_arguments):
        raise RuntimeError("the boiler burst")

    monkeypatch.setattr(experiments.harness.evaluation, "held_out_loss", explode)
    assert inline_cli(*small) == 4
    captured = capsys.readouterr()
    assert captured.err.count("the boiler burst") >= 2 and "crashed: trial" in captured.err
    assert inline_cli(*small) == 4, "a crashed trial is not run again"


def test_out_of_memory_is_told_from_a_crash(inline_cli, small, monkeypatch, tmp_path, read_all):
    import torch

    import experiments.harness.evaluation

    def explode(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(experiments.harness.evaluation, "held_out_loss", explode)
    assert inline_cli(*small) == 4
    assert {r["status"] for r in read_all(tmp_path / "results").values()} == {"oom"}


def test_a_disk_that_fills_up_leaves_no_record_and_the_trial_is_run_again(
    inline_cli, small, monkeypatch, tmp_path, read_all, capsys
):
    import experiments.harness.record

    real = os.fsync

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(experiments.harness.record.os, "fsync", full)
    assert inline_cli(*small) == 2
    said = capsys.readouterr().err
    assert "error: a file or the network failed ([Errno 28] No space left on device); make room" in said
    assert not [p for p in (tmp_path / "results").rglob("*") if p.is_file()]
    monkeypatch.setattr(experiments.harness.record.os, "fsync", real)
    assert inline_cli(*small) == 0
    assert len(read_all(tmp_path / "results")) == 2


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(28, "No space left on device", "checkpoint-2"), "[Errno 28] No space left on device: 'checkpoint-2'"),
        (SafetensorError("I/O error: File too large (os error 27)"), "I/O error: File too large (os error 27)"),
        (RuntimeError("[enforce fail at inline_container.cc:672]"), "[enforce fail at inline_container.cc:672]"),
        (OSError("We couldn't connect to the hub.\nCheck it."), "We couldn't connect to the hub. Check it."),
    ],
)
def test_what_a_disk_or_the_hub_did_to_a_trial_is_no_record_of_it(
    inline_cli, small, monkeypatch, tmp_path, read_all, capsys, error, what
):
    import experiments.harness.evaluation

    def fail(*_arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(experiments.harness.evaluation, "held_out_loss", fail)
        assert inline_cli(*small) == 2
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert f"a file or the network failed ({what}" in said and "run it again" in said
    assert not [p for p in (tmp_path / "results").rglob("*") if p.is_file()]
    assert inline_cli(*small) == 0
    assert len(read_all(tmp_path / "results")) == 2
