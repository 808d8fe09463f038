"""EMACallback across processes: a fresh one, two of them under torchrun, and the guide's snippets word for word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from forge.ema import EMACallback, load_ema_file
from tests.forge import ema_process
from tests.forge.processes import run_python, succeeded, torchrun


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in this process, one thread, global batch of four."""
    folder, threads = tmp_path_factory.mktemp("here"), torch.get_num_threads()
    torch.set_num_threads(1)
    ema_process.train(folder, 4)
    torch.set_num_threads(threads)
    return folder


def test_fresh_process_repeats_the_run_bitwise_and_applies_a_saved_state(here: Path, tmp_path: Path) -> None:
    state = load_ema_file(here / "averages-0.safetensors")
    ema = EMACallback(ema_process.DECAYS)
    ema.load_ema_state(state)
    torch.save({"ema": ema.get_ema_state()}, tmp_path / "checkpoint.pt")
    succeeded(run_python(ema_process.__file__, "train+apply", tmp_path, 4))

    again = load_ema_file(tmp_path / "averages-0.safetensors")
    for label, averages in state["averages"].items():
        assert all(torch.equal(average, again["averages"][label][name]) for name, average in averages.items())
    applied = torch.load(tmp_path / "applied.pt", weights_only=True)
    fresh = dict(ema_process.make_model().named_parameters())
    for name, average in state["averages"]["0.5"].items():
        assert torch.equal(applied[name], average)
    assert not all(torch.equal(applied[name], fresh[name]) for name in applied)


def test_two_processes_equal_one_with_the_same_global_batch(here: Path, tmp_path: Path) -> None:
    succeeded(torchrun(ema_process.__file__, "train", tmp_path, 2))
    expected = load_ema_file(here / "averages-0.safetensors")
    for rank in (0, 1):
        state = load_ema_file(tmp_path / f"averages-{rank}.safetensors")
        assert state["step"] == expected["step"] == 4
        for label, averages in expected["averages"].items():
            torch.testing.assert_close(state["averages"][label], averages, rtol=1e-5, atol=1e-6)
    reports = [json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in (0, 1)]
    assert [report["writes"] for report in reports] == [["checkpoint-2", "checkpoint-4"], []]
    metrics = json.loads((here / "report-0.json").read_text())["metrics"]
    assert "eval_ema_0.99_loss" in metrics
    assert all(report["metrics"] == pytest.approx(metrics, rel=1e-5) for report in reports)


# The guide's snippets; only the import line differs ------------------------------------------------------------------

BASIC = """
from transformers import Trainer, TrainingArguments
from forge.ema import EMACallback

# 1. Создаём callback
ema_callback = EMACallback(decay=0.999)

# 2. Обычный Trainer
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="./output",
        num_train_epochs=3,
        per_device_train_batch_size=4,
    ),
    train_dataset=dataset,
    callbacks=[ema_callback]
)

# 3. Обучаем
trainer.train()

# 4. Применяем EMA веса
ema_callback.apply_ema(model)

# 5. Сохраняем модель с EMA весами
model.save_pretrained("./best_model")
"""

ADVANCED = """
from forge.ema import EMAModel
import torch

# Обёртка для кастомного training loop
ema = EMAModel(model, decay=0.999)

for epoch in range(3):
    for batch in dataloader:
        # Forward
        outputs = model(**batch)
        loss = outputs.loss
        
        # Backward
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        
        # Обновляем EMA
        ema.update()
    
    # Eval с EMA весами
    with ema.use_ema():
        eval_results = evaluate(model, eval_dataset)
        print(f"Epoch {epoch}: {eval_results}")

# Финально применяем EMA
ema.apply_ema()
"""

AUTOMATIC = """
from forge.ema import compute_optimal_decay

decay = compute_optimal_decay(total_steps=10000)
print(f"Recommended: {decay}")  # ~0.9993
"""

SAVE_AND_LOAD = """
import torch

# Сохранение EMA state
ema_state = ema_callback.get_ema_state()
torch.save({
    'model': model.state_dict(),
    'ema': ema_state
}, 'checkpoint.pt')

# Загрузка
checkpoint = torch.load('checkpoint.pt')
model.load_state_dict(checkpoint['model'])
ema_callback.load_ema_state(checkpoint['ema'])
ema_callback.apply_ema(model)
"""


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the guide presupposes: a model, data and a working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    model = ema_process.make_model()
    rows = torch.randint(0, 300, (8, 8), generator=torch.Generator().manual_seed(1))
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    return {
        "model": model,
        "dataset": dataset,
        "dataloader": DataLoader(dataset, batch_size=4),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "eval_dataset": dataset,
        "evaluate": lambda model, data: (
            model(**data[0] | {"input_ids": data[0]["input_ids"][None]}).logits.sum().item()
        ),
    }


def test_guide_basic_then_save_and_load(guide: dict[str, Any], tmp_path: Path) -> None:
    exec(BASIC, guide)
    ema, model = guide["ema_callback"].ema, guide["model"]
    assert ema.step == 6
    saved = type(model).from_pretrained(tmp_path / "best_model")
    assert all(torch.equal(dict(saved.named_parameters())[name], t) for name, t in ema.averages().items())
    exec(SAVE_AND_LOAD, guide)
    assert all(torch.equal(dict(model.named_parameters())[name], t) for name, t in ema.averages().items())


def test_guide_advanced(guide: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    exec(ADVANCED, guide)
    parameters = dict(guide["model"].named_parameters())
    assert guide["ema"].step == 6 and capsys.readouterr().out.count("Epoch") == 3
    assert all(torch.equal(parameters[name], t) for name, t in guide["ema"].averages().items())


def test_guide_automatic_decay(capsys: pytest.CaptureFixture[str]) -> None:
    exec(AUTOMATIC, {})
    assert capsys.readouterr().out.startswith("Recommended: 0.9993")
