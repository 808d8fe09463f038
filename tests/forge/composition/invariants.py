"""What must hold in a cell of the matrix, checked against a witness that knows nothing of ``forge``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import forge
from forge.ema import EMACallback
from tests.forge.composition.cells import STEPS, TACTICS, Cell, Run, Setting, build, train
from tests.forge.composition.shapes import lower_half

DECAYS = (0.5, 0.9)
DROPOUT = 0.1


@dataclass
class Bench:
    """Where cells are run: the saved models, a folder for checkpoints, and runs that several cells compare with."""

    models: Path
    folder: Path
    plain_runs: dict[Setting, Run] = field(default_factory=dict)
    checked_runs: dict[Cell, Run] = field(default_factory=dict)

    def plain(self, setting: Setting) -> Run:
        """The run of a setting without any technique, trained once."""
        if setting not in self.plain_runs:
            model = build(self.models, setting, dropout=DROPOUT)
            self.plain_runs[setting] = train(model, setting, self.folder / "plain", save=False)
        return self.plain_runs[setting]

    def checked(self, cell: Cell) -> Run:
        """The run of a cell whose invariants hold, trained once."""
        if cell not in self.checked_runs:
            self.checked_runs[cell] = check(cell, self)
            shutil.rmtree(self.folder / "runs")
        return self.checked_runs[cell]


def check(cell: Cell, bench: Bench) -> Run:
    """Train, resume from the middle, and assert the invariants of the cell's technique; its uninterrupted run."""
    run = CHECKS[cell.technique](cell.setting, bench, bench.folder / "runs" / cell.id)
    check_setting(cell.setting, run)
    return run


def check_setting(setting: Setting, run: Run) -> None:
    """The method and the memory tactic were really used."""
    assert any("lora_" in name for name in run.start) == (setting.method != "full"), "adapters"
    assert any(w.dtype == torch.uint8 for w in run.start.values()) == (setting.method == "qlora"), "4-bit weights"
    tactic = setting.tactic
    micro_batches = STEPS * TACTICS[tactic].get("gradient_accumulation_steps", 1)
    passes = micro_batches * (2 if tactic == "gradient_checkpointing" else 1)
    assert run.passes == [tactic == "bf16_autocast"] * passes, f"{tactic}: the last layer ran under {run.passes}"


def check_ema(setting: Setting, bench: Bench, folder: Path) -> Run:
    """Averages equal those made from the witness's weights, survive a resume bitwise, and leave training alone."""
    ema, resumed_ema = EMACallback(DECAYS), EMACallback(DECAYS)
    run = train(build(bench.models, setting, dropout=DROPOUT), setting, folder, ema)
    other = build(bench.models, setting, dropout=DROPOUT, seed=1)
    resumed = train(other, setting, folder, resumed_ema, resume=True)
    for decay in DECAYS:
        averages = ema.ema.averages(decay)
        reference = {name: run.start[name].double() for name in run.trajectory[0]}
        for weights in run.trajectory:
            reference = {n: decay * r + (1 - decay) * weights[n].double() for n, r in reference.items()}
        assert averages.keys() == reference.keys(), f"averaged {len(averages)} of {len(reference)} trainable parameters"
        for name, average in averages.items():
            torch.testing.assert_close(average.double(), reference[name], rtol=1e-6, atol=1e-7)
        assert_same(resumed_ema.ema.averages(decay), averages, f"averages of decay {decay} after resuming")
        run.averages |= {f"{decay}/{name}": average for name, average in averages.items()}
    assert_differs(ema.ema.averages(DECAYS[0]), run.trajectory[-1], "averages and raw weights")
    assert_same(resumed.weights, run.weights, "weights after resuming")
    assert_same(run.weights, bench.plain(setting).weights, "weights with and without EMA")
    return run


def check_freezing(setting: Setting, bench: Bench, folder: Path) -> Run:
    """What is frozen is what the shape's names say, it stays bitwise, everything else moves; also after a resume."""
    trainable = set(bench.plain(setting).trajectory[0])
    model = build(bench.models, setting, freeze_ratio=0.5)
    unfrozen = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = trainable - lower_half(setting.shape, trainable)
    assert unfrozen == expected, f"trainable against the names (or the reverse): {sorted(unfrozen ^ expected)[:3]}"
    run = train(model, setting, folder)
    assert_moved(run, unfrozen)
    resumed = train(build(bench.models, setting, freeze_ratio=0.5, seed=1), setting, folder, resume=True)
    assert_same(resumed.weights, run.weights, "weights after resuming")
    return run


def check_monitor(setting: Setting, bench: Bench, folder: Path) -> Run:
    """The history holds the norms that the witness measured before clipping; training is the one without a monitor."""
    monitor, resumed_monitor = forge.MonitorCallback(check_gradients=True), forge.MonitorCallback(check_gradients=True)
    plain = bench.plain(setting)
    run = train(build(bench.models, setting, dropout=DROPOUT), setting, folder, monitor)
    assert_same(run.weights, plain.weights, "weights with and without the monitor")
    assert [record.step for record in monitor.history] == list(range(1, STEPS + 1))
    assert [record.grad_norm for record in monitor.history] == pytest.approx(plain.norms, rel=1e-5)
    assert [record.loss for record in monitor.history] == pytest.approx(plain.losses, rel=1e-5)
    other = build(bench.models, setting, dropout=DROPOUT, seed=1)
    resumed = train(other, setting, folder, resumed_monitor, resume=True)
    assert_same(resumed.weights, run.weights, "weights after resuming")
    assert resumed_monitor.history == monitor.history, "history after resuming"
    return run


CHECKS: Mapping[str, Callable[[Setting, Bench, Path], Run]] = {
    "ema": check_ema,
    "freezing": check_freezing,
    "monitor": check_monitor,
}


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor], what: str) -> None:
    """Two sets of tensors are equal bitwise, and of the same dtypes."""
    assert left.keys() == right.keys(), f"{what}: names differ: {sorted(left.keys() ^ right.keys())[:3]}"
    differing = [n for n in left if left[n].dtype != right[n].dtype or not torch.equal(left[n], right[n])]
    assert not differing, f"{what}: {len(differing)} of {len(left)} tensors differ, the first is {differing[0]}"


def assert_differs(left: Mapping[str, Tensor], right: Mapping[str, Tensor], what: str) -> None:
    """No tensor of one set equals its namesake."""
    equal = [name for name in left if torch.equal(left[name], right[name]) and not without_gradient(name)]
    assert not equal, f"{what}: {len(equal)} of {len(left)} tensors are equal, the first is {equal[0]}"


def baseline_of(cell: Cell) -> Cell:
    """The cell that this one computes the same as, but for rounding: one process, no memory tactic."""
    tactic = "bf16_autocast" if cell.setting.tactic == "bf16_autocast" else "plain"
    return replace(cell, setting=replace(cell.setting, tactic=tactic, processes=1))


def assert_close(weights: Mapping[str, Tensor], norms: list[float], baseline: Run, tolerance: float) -> None:
    """Gradient norms and every weight are those of the baseline; tolerance relative to how far the weight moved.

    Norms are compared too, because clipping hides a gradient that is too large by a factor.
    """
    assert norms == pytest.approx(baseline.norms, rel=tolerance), "gradient norms"
    expected = baseline.weights
    for name, weight in weights.items():
        if without_gradient(name):
            continue
        moved = (expected[name].double() - baseline.start[name].double()).norm()
        off = (weight.double() - expected[name].double()).norm()
        rounding = 1e-7 * expected[name].double().norm()
        assert off <= tolerance * moved + rounding, f"{name}: off by {off:.2g} where the baseline moved by {moved:.2g}"


def assert_moved(run: Run, trainable: set[str]) -> None:
    """Exactly the trainable weights moved."""
    weights = run.weights
    frozen = {name: tensor for name, tensor in weights.items() if name not in trainable}
    assert_same(frozen, {name: run.start[name] for name in frozen}, "frozen weights before and after")
    moved = {name: weights[name] for name in trainable}
    assert_differs(moved, run.start, "trainable weights before and after")


def without_gradient(name: str) -> bool:
    """Whether the loss does not depend on a parameter: softmax cancels what a bias adds to all the keys of a query."""
    return name.endswith(("key.bias", "key.base_layer.bias"))


def tolerance_of(cell: Cell) -> float:
    """How far from its baseline a cell may end, as a share of the way; in bf16, a batch and its parts round apart."""
    return 0.1 if cell.setting.tactic == "bf16_autocast" or cell.setting.method == "qlora" else 1e-3
