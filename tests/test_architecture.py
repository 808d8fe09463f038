"""The one-way flow of the design, by reading every import and by running what must be light."""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("forge", "experiments", "analysis")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ALLOWED_IN_ANALYSIS = (
    "experiments.harness.claims",
    "experiments.harness.record",
    "experiments.harness.experiment",
)
HEAVY = {"torch", "transformers"}


def imports(path):
    """Dotted names of everything that a file imports, at whatever depth, also for type checkers only."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            module = base if node.level else str(node.module)
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                yield str(argument.value)


def within(name, packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def offences(package, forbidden, *, but=(), besides=()):
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.relative_to(ROOT).as_posix() not in besides
        for name in imports(path)
        if within(name, forbidden) and not within(name, but)
    ]


def test_the_reader_of_imports_sees_every_form(tmp_path, monkeypatch):
    path = tmp_path / "pkg" / "module.py"
    path.parent.mkdir()
    path.write_text(
        "import a.b, c\nfrom d import e\ndef f():\n  from . import g\n  from .h import i\n  import_module('j')\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert set(imports(path)) == {"a.b", "c", "d.e", "pkg.g", "pkg.h.i", "j"}


def test_forge_knows_nothing_of_experiments():
    assert offences("forge", ["experiments", "analysis"]) == []


def test_experiments_do_no_statistics():
    # What verdict_calibration measures is the engine itself; run.py is the composition root.
    besides = ["experiments/run.py", "experiments/verdict_calibration.py"]
    assert offences("experiments", ["analysis"], besides=besides) == []
    assert offences("experiments", ["scipy.stats", "statsmodels", "matplotlib"]) == []


def test_analysis_sees_only_what_experiments_declare_and_record():
    assert offences("analysis", ["experiments"], but=ALLOWED_IN_ANALYSIS) == []


def test_analysis_never_trains():
    assert offences("analysis", [*HEAVY, "forge", "peft", "accelerate", "datasets", "wandb", "optuna"]) == []


def run_python(*arguments):
    """Standard output of a fresh interpreter in the root of the repository."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code):
    """Which heavy packages an interpreter has loaded after running some code."""
    report = f"import sys; print(); print(*sorted({HEAVY!r} & sys.modules.keys()))"
    return run_python("-c", f"{code}\n{report}").splitlines()[-1].split()


def modules_of(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_this_check_of_loaded_packages_works():
    assert loaded_by("import transformers") == ["transformers"]


def test_listing_experiments_loads_no_torch():
    assert loaded_by("from experiments.run import main; main([])") == []


def test_listing_experiments_takes_under_half_a_second():
    """Of processor time, which does not depend on what else the machine is doing."""
    seconds = []
    for _ in range(5):
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = run_python("-m", "experiments.run")
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(spent.ru_utime + spent.ru_stime - began.ru_utime - began.ru_stime)
        assert "ema_ablation" in out and "--scale laptop" in out
        if seconds[-1] < 0.5:
            return
    raise AssertionError(f"the list took {min(seconds):.2f} s at best")


def test_an_experiment_and_its_options_load_no_torch():
    assert loaded_by("import experiments.ema_ablation") == []
    plan = "from experiments.run import main; main(['ema_ablation', '--scale', 'smoke', '--dry-run'])"
    assert loaded_by(plan) == []


def test_analysis_loads_no_torch():
    names = [name for name in modules_of("analysis") if not name.startswith("analysis.notebooks.")]
    assert len(names) > 5
    assert loaded_by("import " + ", ".join(names)) == []


def test_every_experiment_file_defines_the_experiment_of_its_name():
    from experiments.harness.experiment import experiment_names, load_experiment

    files = {p.stem for p in (ROOT / "experiments").glob("*.py")} - {"run", "__init__"}
    assert set(experiment_names()) == files
    for name in files:
        experiment = load_experiment(name)
        assert experiment.name == name
        assert {"smoke", "laptop"} <= set(experiment.scales) <= {"smoke", "laptop", "cpu", "gpu", "paper"}
        assert set(experiment.scales) == set(experiment.cost)


def test_claim_ids_are_unique_over_all_experiments():
    from experiments.harness.experiment import load_experiments

    ids = [claim.id for experiment in load_experiments() for claim in experiment.claims]
    assert ids and len(set(ids)) == len(ids)


def test_a_claim_id_used_by_two_experiments_is_refused(monkeypatch):
    from experiments.harness import experiment

    real = experiment.load_experiment("ema_ablation")
    monkeypatch.setattr(experiment, "experiment_names", lambda: ["one", "two"])
    monkeypatch.setattr(experiment, "load_experiment", lambda name: real)
    with pytest.raises(
        experiment.UserError, match=r"claim ids must be unique over all experiments, got .* in ema_ablation"
    ):
        experiment.load_experiments()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_are_short_and_say_what_they_are_for(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    notebook = text.startswith("# %%")
    assert notebook or ast.get_docstring(ast.parse(text)), "no docstring"
