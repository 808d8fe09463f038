"""What the benchmarks share: the models, rounds in rotating order, ratios paired within rounds.

All contenders run once in each round, in rotating order, so that drift of the machine hits them alike; ratios are
paired within rounds, and rounds are the replicates of the intervals.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

SIZES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 128,
        "vocab_size": 1_000,
        "tie_word_embeddings": True,
    },
}
"""Llama shapes, built with random weights."""

Update = Callable[[], Any]
"""One contender: does its work once."""


def build_model(size: str, device: str) -> nn.Module:
    """A Llama of the given shapes with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES[size])).to(device)


def measure(updates: dict[str, Update], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of every contender in every round, after two rounds that are not counted."""
    import torch

    milliseconds: dict[str, list[float]] = {name: [] for name in updates}
    names = list(updates)
    warm_up = 2
    for index in range(warm_up + rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            updates[name]()
            if device != "cpu":
                torch.accelerator.synchronize()
            if index >= warm_up:
                milliseconds[name].append((time.perf_counter() - began) * 1e3)
    return milliseconds


def median_interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Interval of the median from order statistics (sign test), at least ``level``; rounds are the replicates."""
    n, ordered, tail = len(values), sorted(values), 0.0
    rank = 0
    while rank < n // 2:
        tail += math.comb(n, rank) / 2**n
        if 2 * tail > 1 - level:
            break
        rank += 1
    return ordered[max(0, rank - 1)], ordered[n - max(1, rank)]


def paired_ratio(over: list[float], under: list[float]) -> tuple[float, tuple[float, float]]:
    """Median over rounds of the ratio within a round, and its interval."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return statistics.median(ratios), median_interval(ratios)
