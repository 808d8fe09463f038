"""A run that unfreezes layer by layer, for tests that need other processes: ``python freezing_process.py FOLDER 4``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from forge.freezing import GradualUnfreezing


def make_model(family: str = "llama") -> Any:
    """Four layers; GPT-2 with tied embeddings and dropout."""
    set_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=4, n_head=2, n_positions=16, vocab_size=40))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40))


def make_trainer(folder: Path, *callbacks: TrainerCallback, model: Any = None, **options: Any) -> Trainer:
    """Nine steps in three epochs, AdamW with a strong weight decay."""
    rows = torch.randint(0, 40, (12, 8), generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.5,
        "save_strategy": "no",
    }
    fixed = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0, "dataloader_pin_memory": False}
    return Trainer(
        model=make_model() if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **(settings | fixed | options)),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=list(callbacks),
    )


def train(folder: Path, batch_size: int, **options: Any) -> None:
    """Leaves the weights of each process in ``folder``."""
    trainer = make_trainer(
        folder, GradualUnfreezing(2, every=2, unit="step"), per_device_train_batch_size=batch_size, **options
    )
    trainer.train()
    torch.save(trainer.model.state_dict(), folder / f"weights-{trainer.args.process_index}.pt")


if __name__ == "__main__":
    extra = (
        {"activation_checkpointing": True, "ddp_find_unused_parameters": True} if "checkpointing" in sys.argv else {}
    )
    train(Path(sys.argv[1]), int(sys.argv[2]), **extra)
    torch.distributed.destroy_process_group()  # or the process that ends first may take the other with it
