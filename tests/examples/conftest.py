"""A tiny Llama as users have models: a folder with config, weights and tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def on_one_core() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level, 2 layers, random weights."""
    from experiments.harness.models import TINY, load_causal_lm, load_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    load_causal_lm(TINY).save_pretrained(folder)
    load_tokenizer(TINY).save_pretrained(folder)
    return folder
