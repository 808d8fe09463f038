"""Weights & Biases: the offline run of a trial is read back, and the mode is what the user would expect."""

from __future__ import annotations

import json
import struct
from types import SimpleNamespace

import pytest
import wandb

from experiments.harness import worker
from experiments.harness.tracking import default_mode


def read_run(path):
    """Config and history of a ``.wandb`` file: a LevelDB log (32 KiB blocks, 7-byte headers) of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, payload, config, history = path.read_bytes(), b"", {}, []
    position, block = 7, 32 * 1024
    while position + 7 <= len(data):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            break
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record, payload = Record.FromString(payload), b""
            for item in record.run.config.update if record.HasField("run") else ():
                config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            if record.HasField("history"):
                row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                history.append({key: json.loads(value) for key, value in row.items()})
    return config, history


def test_the_offline_run_of_a_trial_is_read_back(inline_cli, small, tmp_path, read_all, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    arguments = [a for a in small if a not in ("--wandb", "disabled")]
    assert inline_cli(*arguments, "--wandb", "offline", "--late-evaluations", "2") == 0
    records = read_all(tmp_path / "results")
    assert {r["wandb_run_id"] for r in records.values()} == set(records), "one run for each trial"
    record = next(r for r in records.values() if r["spec"]["factors"]["track"] == "main")
    (path,) = (tmp_path / "runs" / "wandb").rglob(f"run-{record['trial_id']}.wandb")
    config, history = read_run(path)

    assert config["seed"] == 0 and config["experiment"] == "ema_ablation"
    assert config["factors"] == record["spec"]["factors"]
    logged = {(key, row["train/global_step"]): value for row in history for key, value in row.items()}
    recorded = [o for o in record["observations"] if o.get("split") == "validation" and o["metric"] == "eval_loss"]
    recorded = [o for o in recorded if not o["arm"].startswith("posthoc")]  # evaluated after the run is closed
    assert {o["arm"] for o in recorded} >= {"raw", "ema_0.99", "ema_0.9999", "ema_optimal"}
    for row in recorded:
        label = "" if row["arm"] == "raw" else f"ema_{row['decay']:.6g}_"
        assert logged[f"eval/{label}loss", row["step"]] == row["value"]


def test_disabled_writes_nothing(inline_cli, small, tmp_path, read_all):
    assert inline_cli(*small) == 0
    assert not (tmp_path / "runs" / "wandb").exists()
    assert {r["wandb_run_id"] for r in read_all(tmp_path / "results").values()} == {None}


def test_where_wandb_cannot_start_there_is_no_record(inline_cli, small, tmp_path, monkeypatch, capsys):
    def fail(**_):
        raise wandb.errors.CommError("no route to the server")

    monkeypatch.setattr(wandb, "init", fail)
    arguments = [a for a in small if a not in ("--wandb", "disabled")]
    assert inline_cli(*arguments, "--wandb", "online") == 2
    assert (
        "W&B cannot start a run (no route to the server); mend that, or give --wandb offline" in capsys.readouterr().err
    )
    assert not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]


def test_where_wandb_cannot_end_the_trial_has_its_outcome(inline_cli, small, tmp_path, monkeypatch, capsys, read_all):
    def fail(exit_code):
        raise wandb.errors.CommError(f"gone with exit code {exit_code}")

    monkeypatch.setattr(wandb, "init", lambda **options: SimpleNamespace(id=options["id"], finish=fail))
    monkeypatch.setattr(worker.WorkerContext, "wandb_run_id", lambda self: None)
    arguments = [a for a in small if a not in ("--wandb", "disabled")]
    assert inline_cli(*arguments, "--wandb", "online") == 0
    assert "did not end well (gone with exit code 0); the trial is not touched" in capsys.readouterr().err
    assert {record["status"] for record in read_all(tmp_path / "results").values()} == {"ok"}


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user without any W&B settings."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_offline_unless_logged_in(nobody, monkeypatch):
    assert default_mode() == "offline"
    (nobody / ".netrc").write_text("machine example.org login user password x\n")
    assert default_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert default_mode() == "online"


def test_a_login_in_netrc_is_seen(nobody):
    (nobody / ".netrc").write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    (nobody / ".netrc").chmod(0o600)
    assert default_mode() == "online"


def test_a_broken_netrc_is_no_login(nobody):
    (nobody / ".netrc").write_text("machine\nmachine machine\n")
    assert default_mode() == "offline"


@pytest.mark.parametrize("mode", ["offline", "online", "disabled"])
def test_the_environment_has_the_word(nobody, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert default_mode() == mode
