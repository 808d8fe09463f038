"""Bad input on the command line: one line with the rule, the value and the fix, exit code 2, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from experiments.run import main

SMOKE = ["ema_ablation", "--scale", "smoke", "--wandb", "disabled"]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """``refused(*arguments)``: the one line; fails unless it is all there is, with exit code 2 and nothing written."""
    folder = tmp_path / "empty"
    folder.mkdir()

    def call(*arguments, whole=False):
        monkeypatch.chdir(folder)
        code = main(list(map(str, arguments if whole else [*SMOKE, *arguments])))
        err = capsys.readouterr().err
        assert code == 2
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert list(folder.iterdir()) == [], "something was written"
        return err.removeprefix("error: ").strip()

    return call


def test_unknown_experiment(refused):
    line = refused("ema_ablaton", whole=True)
    assert line.startswith("unknown experiment 'ema_ablaton'; did you mean ema_ablation")


def test_unknown_scale(refused):
    line = refused("ema_ablation", "--scale", "labtop", whole=True)
    assert line == "unknown scale 'labtop'; did you mean laptop? (known: cpu, gpu, laptop, paper, smoke)"


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--decays", "1.5"], "decay must be in (0, 1), got 1.5"),
        (["--decays", "0"], "decay must be in (0, 1), got 0.0"),
        (["--decays", "1"], "decay must be in (0, 1), got 1.0"),
        (["--decays", "nan"], "decay must be in (0, 1), got nan"),
        (["--decays", "0.9", "0.9"], "decays must differ, got 0.9 0.9"),
        (["--length.decays", "-1"], "decay must be in (0, 1), got -1.0"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--length-seeds", "0"], "length_seeds must be at least 1, got 0"),
        (["--workers", "0"], "workers must be at least 1, got 0"),
        (["--steps", "1"], "steps must be different numbers of at least 2"),
        (["--steps", "8", "8"], "steps must be different numbers of at least 2"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--sequence-length", "1"], "sequence_length must be at least 2"),
        (["--curve.sigma-rel", "0.1", "0.3"], "sigma_rel must be in (0, 0.2887], got 0.3"),
        (["--curve.sigma-rel", "0.1", "nan"], "sigma_rel must be in (0, 0.2887], got nan"),
        (["--curve.sigma-rel", "0.1"], "sigma_rel must be two or more rising widths, got 0.1"),
        (["--curve.sigma-rel", "0.2", "0.1"], "sigma_rel must be two or more rising widths, got 0.2 0.1"),
        (["--curve.snapshots", "0"], "snapshots must be at least 1, got 0"),
        (["--length.curve.follow-every", "0"], "follow_every must be at least 1, got 0"),
        (["--curve.follow-every", "7"], "steps must be at least 14, twice curve.follow_every, got 12"),
        (["--late-evaluations", "0"], "late_evaluations must be at least 1, got 0"),
        (["--learning-rate", "0"], "learning_rate must be positive, got 0.0"),
        (["--learning-rate", "nan"], "learning_rate must be positive, got nan"),
        (["--warmup-ratio", "1.1"], "warmup_ratio must be in [0, 1], got 1.1"),
        (["--weight-decay", "-1"], "weight_decay must be at least 0, got -1.0"),
        (["--schedules", "cosine", "cosine"], "schedules must be different ones"),
        (["--time-budget", "soon"], "time_budget must be a number with s, m or h (90s, 9m, 1.5h), got 'soon'"),
        (["--time-budget", "0s"], "time_budget must be positive, got '0s'"),
        (["--time-budget", ""], "time_budget must be a number with s, m or h"),
        (["--model", "smollm2-135"], "did you mean smollm2-135m?"),
        (["--model", "minilm-l6"], "minilm-l6 is an encoder"),
        (["--model", "no such model"], "unknown model 'no such model'"),
        (["--dataset", "mobydick"], "unknown data set 'mobydick'; did you mean moby_dick?"),
        (["--dataset", "missing.txt"], "data file not found: missing.txt"),
        (["--results", "/dev/null/x"], "the results folder /dev/null/x cannot be written (Not a directory)"),
    ],
    ids=" ".join,
)
def test_one_line(refused, arguments, rule):
    assert rule in refused(*arguments)


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ("--model", "the hub cannot be reached"),
        ("--dataset", "data set 'owner/name' could not be loaded from the hub"),
    ],
)
def test_a_hub_id_without_a_network(cli, tmp_path, option, rule):
    done = cli(*SMOKE, option, "owner/name", "--results", tmp_path / "results", "--runs", tmp_path / "runs")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and rule in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_named_within_half_a_minute(cli, tmp_path):
    """``.invalid`` never resolves, which is what a machine without a network sees."""
    places = ["--results", tmp_path / "results", "--runs", tmp_path / "runs"]
    offline = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "https://hub.invalid", "HF_HOME": str(tmp_path / "hf")}
    done = cli(*SMOKE, "--model", "owner/name", *places, **offline)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "the hub cannot be reached" in done.stderr
    assert not (tmp_path / "results").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("empty.txt", b"", "has 0 non-empty document(s), and at least 3 are needed"),
        ("one.txt", b"One document, and no more.\n\nStill the same one.", "has 1 non-empty document(s)"),
        ("two.jsonl", b'{"text": "a"}\n{"text": "b"}\n', "has 2 non-empty document(s)"),
        ("latin.txt", "déjà vu\n\n\nx\n\n\ny".encode("latin-1"), "is not UTF-8 (byte 1: "),
        ("title.jsonl", b'{"title": "a"}\n', "needs a 'text' field; the first row has: title"),
        ("broken.jsonl", b'{"text": ', "cannot be read as .jsonl"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[:12] else "",
)
def test_data_files(refused, tmp_path, name, content, rule):
    (tmp_path / name).write_bytes(content)
    assert rule in refused("--dataset", tmp_path / name)


def test_model_folders(refused, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert "has no config.json" in refused("--model", folder)
    (folder / "config.json").write_text("{}")
    assert "has no *.safetensors; save it so, or give --random-init" in refused("--model", folder, "--no-random-init")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_results_folder_without_permission(refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written (Permission denied)" in refused("--results", tmp_path / "locked" / "results")


def test_a_full_disk_is_noticed_before_anything_is_run(refused, tmp_path, monkeypatch):
    from pathlib import Path

    def full(self, text, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "cannot be written (No space left on device)" in refused("--results", tmp_path / "results")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cells.model", "tiny-randm"], "unknown model 'tiny-randm'; did you mean tiny-random"),
        (["--cells.other-dataset", "moby_dik"], "unknown data set 'moby_dik'; did you mean moby_dick"),
    ],
)
def test_a_model_or_a_data_set_in_a_part_of_the_settings(refused, arguments, words):
    assert words in refused("forgetting", "--scale", "smoke", "--dry-run", *arguments, whole=True)


def test_a_queue_that_cannot_be_opened(refused, tmp_path):
    assert "cannot be opened" in refused("--storage", "foo://x", "--results", tmp_path / "results")
    assert not list((tmp_path / "results").rglob("*.json"))


def test_a_runs_folder_that_cannot_be_written_leaves_no_results_folder(refused, tmp_path):
    assert "the runs folder /dev/null/x cannot be written" in refused(
        "--runs", "/dev/null/x", "--results", tmp_path / "results"
    )
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "qlora"], "it needs a model with weights"),
        (["--sequence-length", "1000000"], "fewer than one block of 1000000"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_only_a_trial_notices_is_no_record(cli, tmp_path, arguments, words):
    places = ["--results", tmp_path / "results", "--runs", tmp_path / "runs", "--wandb", "disabled"]
    done = cli(*SMOKE, "--seeds", "1", "--schedules", "constant", *arguments, *places)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if words in line and line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "results").rglob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bogus", "1"], "Unrecognized options: --bogus"),
        (["--seeds", "many"], "--seeds"),
        (["--schedules", "linear"], "'constant', 'cosine'"),
        (["--wandb", "maybe"], "offline"),
        (["--scale"], "--scale"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_readable(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main([*SMOKE, *arguments])
    assert exit.value.code == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_traceback_in_a_real_terminal(cli, tmp_path):
    done = cli(*SMOKE, "--decays", "1.5", "--results", tmp_path / "results", "--runs", tmp_path / "runs")
    assert (done.returncode, done.stderr) == (2, "error: decay must be in (0, 1), got 1.5\n")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_of_the_plan_who_leaves_gets_no_traceback():
    command = [sys.executable, "-m", "experiments.run", "verdict_calibration", "--dry-run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (3, "")
