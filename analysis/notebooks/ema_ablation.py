# %% [markdown]
# # Does averaging the weights help?
#
# Guides say that an exponential moving average (EMA) of the weights gives "+1–3 %" on evaluation metrics. This
# notebook shows the committed evidence of `experiments/ema_ablation.py`: how the pairs work, what each average
# gained, whether all documents gain or only some, and the verdicts. It is executed by
# `python -m analysis.notebooks.build` from the records in `results/`.

# %%
# mypy: disable-error-code="no-untyped-call"
from pathlib import Path

import pandas as pd
from IPython.display import Image, Markdown, display

from analysis.arms import REDUCTION, arm_table, layout_of, paired_rows
from analysis.cells import VERDICT_HEADER, arm_cells, verdict_cells
from analysis.documents import document_figure, document_gains
from analysis.evidence import in_order, is_default
from analysis.figures import FIGURES, draw, to_png
from analysis.formatting import ENGLISH, markdown_table
from analysis.load import Campaign, load_campaigns
from analysis.tables import as_markdown, heading, judged, trials_line
from analysis.verdicts import NOT_MEASURED
from experiments.harness.experiment import load_experiment

NAME = "ema_ablation"
experiment, layout = load_experiment(NAME), layout_of(NAME)
campaigns, problems = load_campaigns(Path("results"), NAME)
evidence = [campaign for campaign in in_order(campaigns) if is_default(experiment, campaign)]
lines = [f"- {heading(c)}: {trials_line(c)}" for c in evidence] + [f"- {problem}" for problem in problems]
display(Markdown("\n".join(lines) or "No evidence yet: run `python -m experiments.run ema_ablation`."))

# %% [markdown]
# ## What pairing buys
#
# All arms of a seed lie on one training trajectory: they share initial weights, data order and dropout masks. What
# differs between seeds therefore cancels in the difference of two arms. Below, for each arm, the standard deviation
# over seeds of the loss itself, of the loss of the raw weights and of their paired difference; and how many times as
# many seeds unpaired runs would need for an interval of the same width: `(sd² + sd² of raw) / sd² of difference`.


# %%
def pairing(campaign: Campaign) -> pd.DataFrame:
    rows = paired_rows(campaign, layout).dropna(subset=[REDUCTION])
    rows = rows.assign(difference=rows["control"] - rows["value"])
    keys = [*layout.order, layout.arm]
    table = rows.groupby(keys)[["value", "control", "difference"]].std().reset_index()
    unpaired = (table["value"] ** 2 + table["control"] ** 2) / table["difference"] ** 2
    names = {"value": "sd of loss", "control": "sd of raw", "difference": "sd of difference"}
    return table.rename(columns=names).assign(**{"unpaired seeds, ×": unpaired})


def per_seed(campaign: Campaign) -> pd.DataFrame:
    rows = paired_rows(campaign, layout).dropna(subset=[REDUCTION])
    rows = rows[(rows["track"] == "main") & (rows[layout.arm] != "initial")]
    table = rows.pivot_table(index=["schedule", "seed"], columns=layout.arm, values=REDUCTION, sort=False)
    return table.sort_index().map(lambda share: ENGLISH.share(share, 3, signed=True)).reset_index()


for campaign in evidence:
    display(Markdown(f"### {campaign.scope}\n\nReduction against raw weights, seed by seed (track main):"))
    display(Markdown(as_markdown(per_seed(campaign).astype(str))))
    display(Markdown(as_markdown(pairing(campaign).map(lambda x: f"{x:.4g}" if isinstance(x, float) else str(x)))))

# %% [markdown]
# ## All arms
#
# The reduction is that of the test loss against raw weights. Its interval is per arm and not adjusted for the number
# of arms: it describes. `initial_weight_share` says how much of the initial weights is left in the average: where it
# is large, the outcome is mechanical and says nothing about averaging.

# %%
for campaign in evidence:
    cells = as_markdown(arm_cells(campaign, arm_table(campaign, layout)))
    display(Markdown(f"### {campaign.scope}\n\n{cells}"))
    display(Image(to_png(draw(campaign, FIGURES[NAME]))))

# %% [markdown]
# ## All documents, or some?
#
# Each point is one document of the test split: the reduction of its loss by `ema_optimal` against raw weights,
# averaged over seeds. The documents share the trained models, so they are no replicates of the training.

# %%
for campaign in evidence:
    table = document_gains(campaign, layout, arm="ema_optimal", by="schedule", where={"track": "main"})
    scope = campaign.scope_of({"track": "main"})
    gains = table.groupby("schedule")[REDUCTION]
    summary = pd.DataFrame({"documents": gains.size(), "that gain": gains.agg(lambda g: int((g > 0).sum()))})
    display(Markdown(f"### {scope}\n\n{as_markdown(summary.reset_index().astype(str))}"))
    display(Image(to_png(document_figure(table, "schedule", f"Gain by document\n{scope}"))))

# %% [markdown]
# ## Verdicts
#
# A claim is confirmed where its interval lies inside the region in which it is true, refuted where it lies outside,
# and undecided across an edge. These intervals hold simultaneously over all claims of the experiment.

# %%
for campaign in evidence:
    verdicts = [verdict for verdict in judged(campaign) if not verdict.reason.endswith(NOT_MEASURED)]
    rows = [verdict_cells(verdict, campaign) for verdict in verdicts]
    display(Markdown(f"### {campaign.scope}\n\n{markdown_table(VERDICT_HEADER, rows, [False] * len(VERDICT_HEADER))}"))
