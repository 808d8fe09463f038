"""A small training run that can be poisoned, here and in other processes: ``monitor_process.py FOLDER``."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from forge.monitor import MonitorCallback


def make_model(**options: Any) -> LlamaForCausalLM:
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=100, use_cache=False, **options)
    return LlamaForCausalLM(config)


class Poisoned(Trainer):
    """Multiplies the loss at given optimizer steps (from 1), on given processes."""

    factors: dict[int, float]
    rank: int | None = None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        here = self.rank is None or self.rank == self.args.process_index
        factor = self.factors.get(self.state.global_step + 1, 1.0) if here else 1.0
        return (loss[0] * factor, *loss[1:]) if isinstance(loss, tuple) else loss * factor


def make_trainer(
    folder: Path, *callbacks: TrainerCallback, poison: dict[int, float] | None = None, **options: Any
) -> Poisoned:
    """Six optimizer steps with clipping, logged one by one."""
    network = options.pop("model", None) or make_model()
    rows = torch.randint(0, 100, (48, 8), generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
    }
    fixed = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0, "dataloader_pin_memory": False}
    trainer = Poisoned(
        model=network,
        args=TrainingArguments(output_dir=str(folder), **(settings | fixed | options)),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=list(callbacks),
    )
    trainer.factors = poison or {}
    return trainer


def train(folder: Path) -> None:
    """Rank 1 alone has a NaN loss at step 3; leaves the history and the weights of each process in ``folder``."""
    monitor = MonitorCallback(on_unhealthy="skip")
    trainer = make_trainer(folder, monitor, poison={3: math.nan}, max_steps=4, gradient_accumulation_steps=2)
    trainer.rank = 1
    trainer.train()
    rank = trainer.args.process_index
    history = [{"grad_norm": str(r.grad_norm), "loss": str(r.loss), "action": r.action} for r in monitor.history]
    (folder / f"history-{rank}.json").write_text(json.dumps(history))
    torch.save({name: p.detach() for name, p in trainer.model.named_parameters()}, folder / f"weights-{rank}.pt")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
