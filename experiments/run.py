"""Run an experiment: ``python -m experiments.run ema_ablation``; without a name, list the experiments.

The composition root: the only module that touches both experiments and analysis.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from experiments.harness.experiment import (
    WRONG_INPUT,
    Experiment,
    UserError,
    load_experiment,
    load_experiments,
    unknown,
)
from experiments.harness.record import TrialRecord, TrialSpec, read_records, recorded_trials

DEFAULT_SCALE = "laptop"


@dataclass(frozen=True)
class RunOptions:
    """How to run, whatever the experiment."""

    scale: str = DEFAULT_SCALE
    """Set of defaults: smoke, laptop, cpu, gpu, paper (the other options change single values)."""
    dry_run: bool = False
    """Print the resolved plan and its cost, and stop."""
    plan: bool = False
    """Print, for each claim with pilot data, what the planned seeds can detect and how many are needed, and stop."""
    workers: int = 1
    """Processes that run trials side by side; the cores are divided among them."""
    storage: str | None = None
    """Optuna storage of the queue; postgresql://… lets many machines that have one results folder share it. Default:
    SQLite in the runs folder."""
    time_budget: str | None = None
    """Stop claiming trials, checkpoint and exit after this long: 90s, 9m, 1.5h."""
    wandb: Literal["offline", "online", "disabled"] | None = None
    """Weights & Biases mode. Default: online when logged in, else offline."""
    results: Path = Path("results")
    """Folder of the records."""
    runs: Path = Path("runs")
    """Folder of checkpoints, the queue and W&B files; safe to delete when nothing is unfinished."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"workers must be at least 1, got {self.workers}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 2 wrong input, 3 stopped before the end, 4 trials failed)."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not argv or argv[0] in ("-h", "--help", "--results"):
            code = _list(argv)
        else:
            experiment = load_experiment(argv[0])
            code = _run(experiment, *_parse(experiment, argv[1:]))
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:  # nobody reads on, as in ``--dry-run | head``; what is left in the buffer must not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 3


def _list(argv: Sequence[str]) -> int:
    """Every experiment with its question, cost and status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run", description="Run an experiment, or list them all."
    )
    parser.add_argument("experiment", nargs="?", help="see below; EXPERIMENT --help shows its options")
    parser.add_argument("--results", type=Path, default=RunOptions.results, help="folder of the records")
    parsed = parser.parse_args([a for a in argv if a not in ("-h", "--help")])
    if len(argv) and argv[0] in ("-h", "--help"):
        parser.print_help()
        print()
    for experiment in load_experiments():
        print(f"{experiment.name}  (version {experiment.version}, {len(experiment.claims)} claims)")
        print(f"  {experiment.question}")
        unplaced = recorded_trials(parsed.results, experiment.name, experiment.version)
        for scale, settings in experiment.scales.items():
            specs = experiment.trials(settings, scale)
            done = unplaced.intersection(spec.trial_id for spec in specs) if unplaced else unplaced  # ids take time
            unplaced = unplaced - done
            print(f"  --scale {scale:<7} {len(done):>3}/{len(specs):<3} trials done   {experiment.cost[scale]}")
    print("\npython -m experiments.run NAME [--scale SCALE] [--dry-run] [options]; NAME --help lists the options")
    return 0


def _parse(experiment: Experiment, argv: Sequence[str]) -> tuple[RunOptions, Any]:
    """The run options and the experiment's settings; the scale decides the defaults of the latter."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--scale", default=DEFAULT_SCALE)
    scale = first.parse_known_args(argv)[0].scale
    if scale not in experiment.scales:
        raise UserError(unknown("scale", scale, experiment.scales))
    default = experiment.scales[scale]
    flat = tyro.conf.arg(name="")
    form = dataclasses.make_dataclass(
        "Arguments",
        [
            ("run", Annotated[RunOptions, flat], RunOptions(scale=scale)),
            ("settings", Annotated[type(default), flat], default),
        ],
        frozen=True,
    )
    parsed = tyro.cli(
        form,
        args=argv,
        prog=f"python -m experiments.run {experiment.name}",
        description=f"{experiment.question}\n\nDefaults are those of --scale {scale}.",
        config=(tyro.conf.AvoidSubcommands,),
    )
    return parsed.run, parsed.settings


def _run(experiment: Experiment, options: RunOptions, settings: Any) -> int:
    from rich.console import Console

    console = Console(stderr=True)
    specs = experiment.trials(settings, options.scale)
    if options.plan:
        return _plan(experiment, specs, options.results)
    seconds = _seconds(options.time_budget)
    fingerprints = _check_inputs(specs)
    records = _records(experiment, specs, options.results, console)
    _check_same_data(records.values(), fingerprints)
    missing = [spec for spec in specs if spec.trial_id not in records]
    _print_plan(experiment, specs, records, options)
    if options.dry_run:
        return 0
    if missing:
        _check_writable(options.results, "results")
        _check_writable(options.runs, "runs")
        _fetch_weights(specs)
        deadline = None if seconds is None else time.time() + seconds
        codes = _run_workers(specs, records, options, deadline, console)
        if WRONG_INPUT in codes:
            return WRONG_INPUT
        for number in sorted({-code for code in codes if code is not None and code < 0}):
            print(
                f"a worker was killed ({signal.Signals(number).name}); where memory is too small, which the system "
                "answers so, give fewer --workers or a smaller --batch-size",
                file=sys.stderr,
            )
        records = _records(experiment, specs, options.results, console)
    return _report(experiment, specs, records, options)


def _plan(experiment: Experiment, specs: Sequence[TrialSpec], results: Path) -> int:
    """The power of the design, from the variance of the evidence that is there."""
    from analysis.load import load_campaigns
    from analysis.planning import summary

    campaigns, problems = load_campaigns(results, experiment.name)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(summary(experiment, specs, campaigns))
    return 0


def _source(spec: TrialSpec) -> dict[str, Any] | None:
    """The settings of a trial that name a model: those at the top, under its track, or in a part of another name."""
    settings = spec.settings.get(str(spec.factors.get("track")), spec.settings)
    parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    return next((part for part in parts if "model" in part), None)


def _inputs(specs: Iterable[TrialSpec]) -> set[tuple[str, str, bool, str]]:
    """(model, data set, random weights, task) of every trial, with the data set that is only looked at."""
    return {
        (source["model"], source[name], source.get("random_init", False), source.get("task", "causal_lm"))
        for source in map(_source, specs)
        if source is not None
        for name in ("dataset", "other_dataset")
        if name in source
    }


def _check_inputs(specs: Sequence[TrialSpec]) -> dict[tuple[str, str], str]:
    """Models and data sets are checked once, before anything is written; fingerprints by data set and task."""
    from experiments.harness.data import load_corpus
    from experiments.harness.models import check_causal_lm, check_model

    fingerprints = {}
    for model, dataset, random_init, task in sorted(_inputs(specs)):
        classification = task == "classification"
        (check_model if classification else check_causal_lm)(model, random_init=random_init)
        fingerprints[dataset, task] = load_corpus(dataset, labelled=classification).fingerprint
    return fingerprints


def _check_same_data(records: Iterable[TrialRecord], fingerprints: Mapping[tuple[str, str], str]) -> None:
    """Refuse to go on with, or to show as the answer, what was measured on other data under the same name."""
    for record in records:
        source = _source(record.spec)
        if source is None or "data" not in record.digests:
            continue
        dataset = source["dataset"]
        if record.digests["data"] != fingerprints[dataset, source.get("task", "causal_lm")]:
            raise UserError(
                f"data set {dataset!r} is not what it was when trial {record.trial_id} was recorded; choose another "
                "folder with --results, or rename the data set"
            )


def _fetch_weights(specs: Sequence[TrialSpec]) -> None:
    """Embedded weights are fetched by the parent, where a failure is one line for the user and not a crashed trial."""
    from experiments.harness.models import EMBEDDED, ensure_embedded

    for model in {model for model, *_ in _inputs(specs)} & set(EMBEDDED):
        ensure_embedded(model)


def _check_writable(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be made or written, leaving nothing behind."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    try:
        probe = existing / f".probe-{os.getpid()}"
        probe.write_text("x" * 4096)
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"the {option} folder {folder} cannot be written ({error.strerror}); choose another with --{option}"
        ) from error


def _records(experiment: Experiment, specs: Sequence[TrialSpec], results: Path, console: Any) -> dict[str, TrialRecord]:
    """Valid records of the planned trials; a record that does not validate is named and left alone."""
    records, problems = read_records(results / experiment.name)
    for problem in problems:
        console.print(f"[yellow]warning:[/] {problem}", highlight=False)
    planned = {spec.trial_id for spec in specs}
    return {record.trial_id: record for record in records if record.trial_id in planned}


def _print_plan(
    experiment: Experiment, specs: Sequence[TrialSpec], records: dict[str, TrialRecord], options: RunOptions
) -> None:
    print(f"{experiment.name} v{experiment.version} at scale {options.scale}: {experiment.question}")
    declared = experiment.trials(experiment.scales[options.scale], options.scale)
    whole = "whole" if {spec.trial_id for spec in specs} == {spec.trial_id for spec in declared} else "scale's own plan"
    print(f"{len(records)} of {len(specs)} trials have a record; cost of the {whole}: {experiment.cost[options.scale]}")
    if records:
        spent = sum(sum(record.seconds.values()) for record in records.values())
        print(f"those that have one took {_spell_out(spent)} of worker-process time")
    left = _measured_seconds_left(specs, records)
    if left is not None:
        print(f"the rest takes about {_spell_out(left)} of it, by the trials that are done")
    if options.dry_run:
        for spec in specs:
            factors = " ".join(f"{k}={v}" for k, v in spec.factors.items())
            state = records[spec.trial_id].status if spec.trial_id in records else "to do"
            print(f"  {spec.trial_id}  seed={spec.seed} {factors}  {state}")
        for key, value in specs[0].settings.items():
            print(f"  {key}: {value}")


def _spell_out(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.4 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _measured_seconds_left(specs: Sequence[TrialSpec], records: dict[str, TrialRecord]) -> float | None:
    """Process time that the missing trials need, by recorded trials of the same factor levels; None if one has none."""
    walls: dict[str, list[float]] = {}
    for record in (record for record in records.values() if record.status == "ok"):
        walls.setdefault(str(record.spec.factors), []).append(sum(record.seconds.values()))
    missing = [str(spec.factors) for spec in specs if spec.trial_id not in records]
    if not missing or any(factors not in walls for factors in missing):
        return None
    return sum(sum(walls[factors]) / len(walls[factors]) for factors in missing)


def _run_workers(
    specs: Sequence[TrialSpec],
    records: dict[str, TrialRecord],
    options: RunOptions,
    deadline: float | None,
    console: Any,
) -> set[int | None]:
    """Run the missing trials and return the exit codes of the workers."""
    from experiments.harness.display import Progress
    from experiments.harness.queue import enqueue, open_study
    from experiments.harness.tracking import default_mode
    from experiments.harness.worker import WorkerConfig, run_worker

    storage = options.storage or f"sqlite:///{options.runs / 'queue.db'}"
    enqueue(open_study(storage, specs[0]), specs, set(records))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    stopping = spawn.Event()
    config = WorkerConfig(
        specs=tuple(specs),
        storage=storage,
        results=options.results,
        runs=options.runs,
        wandb=options.wandb or default_mode(),
        deadline=deadline,
        threads=max(1, cores // options.workers),
        parent=os.getpid(),
        stopping=stopping,
    )
    workers = [spawn.Process(target=run_worker, args=(config,)) for _ in range(options.workers)]
    for worker in workers:
        worker.start()

    # Ctrl-C reaches the whole process group, `kill -INT` the parent alone: each worker checkpoints and ends in both
    # cases, and the parent waits for them.
    def stop(*_: object) -> None:
        stopping.set()
        console.print("stopping: writing checkpoints (Ctrl-C again to abort)")

    signal.signal(signal.SIGINT, stop)
    try:
        Progress(specs, options.results, options.runs).follow(console, lambda: any(w.is_alive() for w in workers))
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for worker in workers:
        worker.join()
    return {worker.exitcode for worker in workers}


def _report(
    experiment: Experiment, specs: Sequence[TrialSpec], records: dict[str, TrialRecord], options: RunOptions
) -> int:
    """The table and the verdicts, and what is left to do."""
    from analysis.tables import summary

    failed = [record for record in records.values() if record.status != "ok"]
    for record in failed:
        first = (record.error or "").strip().splitlines()[-1:]
        print(f"{record.status}: trial {record.trial_id}: {' '.join(first)}", file=sys.stderr)
    print(summary(experiment.name, options.results, specs[0].campaign_id))
    left = len(specs) - len(records)
    if left:
        print(f"{left} of {len(specs)} trials are left; the same command continues", file=sys.stderr)
        return 3
    return 4 if failed else 0


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        value = float(text[:-1]) * units[text[-1]]
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"time_budget must be a number with s, m or h (90s, 9m, 1.5h), got {text!r}") from error
    if value <= 0:
        raise UserError(f"time_budget must be positive, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
