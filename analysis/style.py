"""Colours and conventions that all figures share."""

from __future__ import annotations

from typing import Any

INK, MUTED, CLAIMED = "#222222", "#767676", "#e8eef5"
HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Okabe–Ito colours, distinguishable with colour-blindness."""
MARKERS = ("o", "s", "^", "v")
NAMES = {
    "language_modelling": "language modelling",
    "classification": "sentiment",
    "full": "all weights",
    "lora": "LoRA",
}
"""What a reader sees of tracks and methods."""
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
