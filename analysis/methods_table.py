"""The classic guide's table of methods («Отличия от других методов адаптации», seed 004), from data.

Serves the section «Classic fine-tuning» of THEORY.md: parameters, memory, quality and time of every method of
``sft_vs_lora_vs_qlora``, where the guide has words.
"""

from __future__ import annotations

import pandas as pd

from analysis.arms import arm_table, layout_of
from analysis.costs import MB, MEASURED, TIMES, cost_table
from analysis.formatting import NOTHING, Style, markdown_table
from analysis.load import Campaign

EXPERIMENT = "sft_vs_lora_vs_qlora"
HEADER = ("метод", "задача", "обучается", "память шага, МБ", "шаг, с", "файл, МБ", "loss ± sd", "accuracy", "n")
NOTE = (
    "Таблица «Отличия от других методов адаптации» (seed 004) по данным: каждый метод настроен с одинаковым бюджетом, "
    "средние по сидам. Память и время — у среднего размера метода (ранг, число токенов), остальное — у подобранного."
)


def methods_markdown(campaign: Campaign, style: Style) -> str:
    """The table and its note; empty for another experiment, or where no cost was measured."""
    if campaign.experiment != EXPERIMENT or (cost := cost_table(campaign)).empty:
        return ""
    quality = arm_table(campaign, layout_of(EXPERIMENT))
    rows = quality.merge(cost[["track", "method", MEASURED, TIMES[0]]], on=["track", "method"])
    cells = [_cells(row, style) for _, row in rows.iterrows()]
    return f"{NOTE}\n\n{markdown_table(HEADER, cells, [False] * 2 + [True] * 7, padded=False)}"


def _cells(row: pd.Series[float], style: Style) -> list[str]:
    def shown(value: float, digits: int) -> str:
        return NOTHING if pd.isna(value) else style.number(float(value), digits)

    loss = f"{shown(row['eval_loss_mean'], 4)} ± {shown(row['eval_loss_sd'], 4)}"
    share = f"{style.number(100 * float(row['trainable_share_mean']), 2)}{style.percent}"
    sizes = [shown(row[MEASURED] / MB, 1), shown(row[TIMES[0]], 3), shown(row["saved_bytes_mean"] / MB, 2)]
    names = [str(row["method"]), str(row["track"])]
    return [*names, share, *sizes, loss, shown(row["accuracy_mean"], 3), str(int(row["n"]))]
