"""Every technique with every method, memory tactic, shape of model and number of processes: 288 generated cells."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import default_data_collator

from forge.presets import get_preset
from tests.forge.composition.cells import CELLS, Cell, Setting, build, quiet
from tests.forge.composition.invariants import Bench, assert_close, assert_same, baseline_of, tolerance_of
from tests.forge.composition.shapes import SHAPES, examples, load_model, save_models
from tests.forge.processes import torchrun


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("composition")
    save_models(folder / "models")
    with quiet():
        yield Bench(folder / "models", folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def two_processes(bench: Bench, request: pytest.FixtureRequest) -> dict[str, list[dict[str, Any]]]:
    """Outcomes of both processes for each cell of two; the processes are started once, for the cells selected."""
    folder = bench.folder / "two"
    folder.mkdir()
    selected = [item.callspec.params.get("cell") for item in request.session.items if hasattr(item, "callspec")]
    ids = [cell.id for cell in selected if isinstance(cell, Cell) and cell.setting.processes == 2]
    (folder / "cells.json").write_text(json.dumps(ids))
    done = torchrun("-m", "tests.forge.composition.two_processes", bench.models, folder, timeout_sec=1800)
    outcomes: dict[str, list[dict[str, Any]]] = {cell_id: [] for cell_id in ids}
    for path in sorted(folder.glob("outcomes-*.jsonl")):
        for line in path.read_text().splitlines():
            outcome = json.loads(line)
            outcomes[outcome["cell"]].append(outcome)
    for cell_id in ids:
        missing = {"cell": cell_id, "error": f"the processes ended before this cell: {done.stderr[-3000:]}"}
        outcomes[cell_id] += [missing] * (2 - len(outcomes[cell_id]))
    return outcomes


def test_the_matrix_is_whole() -> None:
    assert len(CELLS) == 3 * 3 * 4 * 4 * 2


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())
def test_cell(cell: Cell, bench: Bench, request: pytest.FixtureRequest) -> None:
    if cell.setting.processes == 1:
        run = bench.checked(cell)
        weights, norms = run.weights, run.norms
    else:
        outcomes = request.getfixturevalue("two_processes")[cell.id]
        for rank, outcome in enumerate(outcomes):
            assert not outcome["error"], f"process {rank}: {outcome['error']}"
        assert outcomes[0]["digest"] == outcomes[1]["digest"], "the two processes ended with different weights"
        weights, norms = load_file(outcomes[0]["weights"]), outcomes[0]["norms"]
    if cell.technique == "freezing":  # the technique without dropout, whose masks differ from one process to the next
        assert_close(weights, norms, bench.checked(baseline_of(cell)), tolerance_of(cell))


# Traps of the libraries beneath ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_an_evaluation_leaves_the_gradients_of_qlora_alone(shape: str, bench: Bench) -> None:
    """On a CPU, bitsandbytes repacks 4-bit weights at the first evaluation, for a kernel without a backward pass."""
    model = build(bench.models, Setting("qlora", "plain", shape, 1))
    batch = default_data_collator(examples(shape))
    before = gradients(model, batch)
    assert any(gradient.any() for gradient in before.values())
    with torch.no_grad():
        model.eval()(**batch)
    assert_same(gradients(model, batch), before, "gradients before and after an evaluation")


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Next to the matrix: what cannot work says so -------------------------------------------------------------------------

IMPOSSIBLE: dict[str, tuple[str, dict[str, Any], bool, str]] = {
    "full training of 4-bit weights": ("sft", {}, True, "must not be quantised, got a quantised"),
    "QLoRA on weights that are not quantised": ("qlora", {}, False, "'qlora' needs 4-bit weights, got"),
}
"""Combination → preset, its options, whether the weights are in 4 bits, and what the error says."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("preset", "options", "quantised", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_what_cannot_work_says_so(
    preset: str, options: dict[str, Any], quantised: bool, message: str, shape: str, bench: Bench
) -> None:
    loading = {"quantization_config": get_preset("qlora").get_bnb_config()} if quantised else {}
    model = load_model(bench.models, shape, 0.0, **loading)
    with pytest.raises(ValueError, match=message):
        get_preset(preset, **options).prepare(model)


@pytest.mark.parametrize(
    ("preset", "option"),
    [("adalora", "freeze_ratio"), ("prompt-tuning", "freeze_ratio"), ("prefix-tuning", "gradient_checkpointing")],
)
def test_an_option_that_a_preset_could_only_ignore_is_refused(preset: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"'{option}' for '{preset}': "):
        get_preset(preset, **{option: 1})
