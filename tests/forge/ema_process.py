"""A small training run with averages, for tests that need other processes: ``python ema_process.py train FOLDER 4``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import forge.ema.callback
from forge.ema import EMACallback

DECAYS = (0.5, 0.99)


def make_model() -> LlamaForCausalLM:
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=300, attention_dropout=0.0))


def train(folder: Path, batch_size: int) -> None:
    """Four steps on a tiny Llama; leaves the averages, metrics and writes of each process in ``folder``."""
    writes: list[str] = []
    save = forge.ema.callback.save_ema_file

    def recording_save(state: Any, path: Path) -> None:
        writes.append(path.parent.name)
        save(state, path)

    rows = torch.randint(0, 300, (24, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]
    ema = EMACallback(DECAYS)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_0.5_loss",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=make_model(), args=arguments, train_dataset=data, eval_dataset=data[:8], callbacks=[ema])
    forge.ema.callback.save_ema_file = recording_save
    try:
        trainer.train()
    finally:
        forge.ema.callback.save_ema_file = save
    metrics = {key: value for key, value in trainer.evaluate().items() if key.endswith("_loss")}
    rank = arguments.process_index
    save(ema.get_ema_state(), folder / f"averages-{rank}.safetensors")
    (folder / f"report-{rank}.json").write_text(json.dumps({"writes": writes, "metrics": metrics}))


def apply(folder: Path) -> None:
    """Load ``checkpoint.pt`` into a fresh callback and apply it to a model that was never trained."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    model, ema = make_model(), EMACallback(DECAYS)
    ema.load_ema_state(checkpoint["ema"])
    ema.apply_ema(model, 0.5)
    torch.save({name: p.detach() for name, p in model.named_parameters()}, folder / "applied.pt")


if __name__ == "__main__":
    target = Path(sys.argv[2])
    if "train" in sys.argv[1]:
        train(target, int(sys.argv[3]))
    if "apply" in sys.argv[1]:
        apply(target)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
