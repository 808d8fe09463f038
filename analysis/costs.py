"""What a training step costs: measured memory by component, its prediction beside it, and time, one row an arm.

Serves the sections «Layer Freezing» and «Memory Estimation» of THEORY.md through tables and blocks. It describes the
records of any experiment that measured what a step costs; the verdicts come from ``analysis.verdicts``.
"""

from __future__ import annotations

import pandas as pd

from analysis.formatting import NOTHING, Style, markdown_table
from analysis.load import Campaign

MB = 10**6
MEASURED, PREDICTED, FORMULA = "peak_memory_bytes", "predicted_peak_bytes", "seed_formula_bytes"
COMPONENTS = ("parameter_bytes", "gradient_bytes", "optimizer_bytes")
TIMES = ("step_time_sec", "tokens_per_second")
METRICS = (MEASURED, PREDICTED, FORMULA, *COMPONENTS, *TIMES)
_BOOKKEEPING = {"trial_id", "seed", "status", "metric", "unit", "value", "step"}

HEADERS = {
    "en": ("parameters", "gradients", "optimizer", "peak", "predicted", "formula", "step", "tokens/s", "n"),
    "ru": ("параметры", "градиенты", "оптимизатор", "пик", "предсказано", "формула гайда", "шаг", "токенов/с", "n"),
}
NOTES = {
    "en": "Memory of one real step in MB (10⁶ bytes), mean over seeds; predicted and formula with their ratio to the "
    "peak. Step: median seconds of a step, mean over seeds. n: seeds. Padding counts as tokens.",
    "ru": "Память одного настоящего шага в МБ (10⁶ байт), среднее по сидам; рядом — отношение к пику. "
    "Шаг: медиана секунд на шаг, среднее по сидам. n — число сидов.",
}


def cost_table(campaign: Campaign) -> pd.DataFrame:
    """Means over seeds of all cost metrics, a row for each combination of conditions in the order of the plan.

    Columns: the conditions, ``n`` (seeds), and those of ``METRICS`` that were recorded. Empty where no trial measured
    both memory and time of a step.
    """
    observations = campaign.observations
    if observations.empty:
        return pd.DataFrame()
    memory, time = (observations.loc[observations["metric"] == metric, "trial_id"] for metric in (MEASURED, TIMES[0]))
    rows = observations[observations["metric"].isin(METRICS) & observations["trial_id"].isin({*memory} & {*time})]
    if rows.empty:
        return pd.DataFrame()
    keys = [c for c in rows.columns if c not in _BOOKKEEPING and rows[c].notna().any()]
    wide = rows.pivot_table(index=keys, columns="metric", values="value", aggfunc="mean", sort=False)
    wide.insert(0, "n", rows.groupby(keys, sort=False)["seed"].nunique())
    return wide.reset_index()


def cost_markdown(campaign: Campaign, language: str, style: Style) -> str:
    """The cost table and its note, in ``en`` or ``ru``, without what all rows share; empty where there is none."""
    table = cost_table(campaign)
    if table.empty:
        return ""
    keys = [name for name in table.columns if name not in (*METRICS, "n") and table[name].nunique() > 1]
    cells = [[*map(str, row[keys]), *_cells(row, style)] for _, row in table.iterrows()]
    header = [*keys, *HEADERS[language]]
    numeric = [*[False] * len(keys), *[True] * len(HEADERS[language])]
    return f"{markdown_table(header, cells, numeric, padded=False)}\n\n{NOTES[language]}"


def _cells(row: pd.Series[float], style: Style) -> list[str]:
    def megabytes(metric: str) -> str:
        value = row.get(metric)
        return NOTHING if value is None or pd.isna(value) else style.number(float(value) / MB, 1)

    def beside_peak(metric: str) -> str:
        shown = megabytes(metric)
        return shown if shown == NOTHING else f"{shown} ({style.number(float(row[metric] / row[MEASURED]), 4)})"

    step, rate = (row.get(metric) for metric in TIMES)
    times = [
        NOTHING if value is None or pd.isna(value) else style.number(float(value), digits)
        for value, digits in ((step, 3), (rate, 0))
    ]
    figures = [*map(megabytes, COMPONENTS), megabytes(MEASURED), beside_peak(PREDICTED), beside_peak(FORMULA)]
    return [*figures, *times, str(int(row["n"]))]
