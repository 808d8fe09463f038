"""Trial ids and records: stable, sensitive, written whole or not at all, never edited."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from experiments.harness import record as module
from experiments.harness.record import EVAL_LOSS, Observation, TrialRecord, TrialSpec, read_records, write_record

FIELDS = {
    "experiment": "ema_ablation",
    "version": 1,
    "scale": "cpu",
    "seed": 0,
    "factors": {"schedule": "cosine", "steps": 200},
    "settings": {"model": "m", "learning_rate": 5e-5, "nested": {"decays": [0.9, 0.99]}, "имя": "ж"},
}
SPEC = TrialSpec(**FIELDS)


def record_of(spec=SPEC, **changes):
    fields = {
        "trial_id": spec.trial_id,
        "spec": spec,
        "plan": [spec.trial_id],
        "claims": {"a": "b"},
        "status": "ok",
        "observations": [Observation.of(EVAL_LOSS, 0.1 + 0.2, 3, arm="raw", decay=None)],
        "git_commit": None,
        "git_dirty": None,
        "packages": {},
        "hardware": {"device": "cpu"},
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:00:01+00:00",
    }
    return TrialRecord(**{**fields, **changes})


def test_the_trial_id_is_frozen():
    """Evidence on disk is found again only while it does not move."""
    assert SPEC.trial_id == "75ae00cfa28c70cf"


def test_the_trial_id_is_the_same_in_a_fresh_process():
    code = f"from experiments.harness.record import TrialSpec; print(TrialSpec(**{FIELDS!r}).trial_id)"
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == SPEC.trial_id


def test_the_trial_id_does_not_depend_on_the_order_of_keys_or_a_round_trip():
    turned = {**FIELDS, "factors": dict(reversed(FIELDS["factors"].items()))}
    assert TrialSpec(**turned).trial_id == SPEC.trial_id
    assert TrialSpec.model_validate_json(SPEC.model_dump_json()).trial_id == SPEC.trial_id


@pytest.mark.parametrize(
    "change",
    [
        {"experiment": "other"},
        {"version": 2},
        {"scale": "gpu"},
        {"seed": 1},
        {"factors": {"schedule": "constant", "steps": 200}},
        {"factors": {"schedule": "cosine"}},
        {"settings": {**FIELDS["settings"], "learning_rate": 5.0001e-5}},
        {"settings": {**FIELDS["settings"], "nested": {"decays": [0.99, 0.9]}}},
        {"settings": {**FIELDS["settings"], "more": None}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_trial_id_is_sensitive_to_every_field(change):
    other = TrialSpec(**{**FIELDS, **change})
    assert other.trial_id != SPEC.trial_id
    assert (other.campaign_id == SPEC.campaign_id) == (set(change) <= {"seed", "factors"})


def test_a_record_comes_back_as_it_was_written(tmp_path):
    path = write_record(tmp_path, record_of())
    assert path == tmp_path / "ema_ablation" / "v1" / f"{SPEC.trial_id}.json"
    assert read_records(tmp_path) == ([record_of()], [])
    assert read_records(tmp_path)[0][0].observations[0].value == 0.1 + 0.2
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_record_is_never_edited(tmp_path):
    path = write_record(tmp_path, record_of())
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="records are never edited"):
        write_record(tmp_path, record_of(status="crashed", error="x"))
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, function):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, function, full)
    with pytest.raises(OSError, match="No space left"):
        write_record(tmp_path, record_of())
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_the_file_appears_only_when_it_is_whole_and_on_disk(tmp_path, monkeypatch):
    seen = []
    real = os.fsync

    def watched(descriptor):
        seen.append([p.name for p in tmp_path.rglob("*.json")])
        (temporary,) = (p for p in tmp_path.rglob("*") if p.is_file())
        seen.append(json.loads(temporary.read_text())["trial_id"])
        real(descriptor)

    monkeypatch.setattr(module.os, "fsync", watched)
    write_record(tmp_path, record_of())
    assert seen == [[], SPEC.trial_id]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "not a valid trial record"),
        ('{"half": ', "not a valid trial record"),
        ("[1]", "not a valid trial record"),
        (record_of().model_dump_json().replace('"ok"', '"fine"'), "not a valid trial record (status: "),
        (record_of().model_dump_json().replace('"plan"', '"plans"'), "not a valid trial record (plan: "),
        (record_of().model_dump_json().replace('"schema_version":1', '"schema_version":2'), "(schema_version: "),
        (record_of().model_dump_json().replace('"seed":0', '"seed":1'), "trial_id does not match its spec"),
        (record_of().model_dump_json(), "trial_id does not match its spec"),
        (b"\xff\xfe", "not a valid trial record"),
    ],
)
def test_a_file_that_is_no_record_is_named_and_the_others_are_used(tmp_path, text, rule):
    good = write_record(tmp_path, record_of())
    bad = good.with_name("0123456789abcdef.json")
    bad.write_bytes(text if isinstance(text, bytes) else text.encode())
    records, problems = read_records(tmp_path)
    assert records == [record_of()]
    assert len(problems) == 1 and str(bad) in problems[0] and rule in problems[0] and "left alone" in problems[0]
    assert "\n" not in problems[0] and bad.exists()


def test_an_observation_has_the_name_and_unit_of_its_metric():
    row = Observation.of(EVAL_LOSS, 2.5, 10, arm="raw", split="test").model_dump()
    assert row == {
        "metric": "eval_loss", "unit": "nats/token", "value": 2.5, "step": 10, "arm": "raw", "split": "test"
    }  # fmt: skip


def test_a_spec_is_frozen_and_takes_no_stranger():
    with pytest.raises(ValidationError):
        TrialSpec(**FIELDS, colour="red")
    with pytest.raises(ValidationError):
        SPEC.seed = 1
