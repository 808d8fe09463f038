# ruff: noqa: E402
# %% [markdown]
# # Does averaging the weights help?
#
# Guides say that an exponential moving average (EMA) of the weights gives "+1–3 %" on evaluation metrics. This
# notebook shows the committed evidence of `experiments/ema_ablation.py`: how the pairs work, what each average
# gained, whether all documents gain or only some, and the verdicts. It is executed by
# `python -m analysis.notebooks.build` from the records in `results/`.

# %%
from pathlib import Path

import pandas as pd
from IPython.display import Image, Markdown, display

from analysis.arms import REDUCTION, arm_table, layout_of, paired_rows
from analysis.cells import VERDICT_HEADER, arm_cells, verdict_cells
from analysis.evidence import in_order, is_default
from analysis.figures import FIGURES, document_figure, draw, to_png
from analysis.formatting import markdown_table
from analysis.load import load_campaigns
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
# over seeds of the loss itself and of its paired difference to the raw weights, and how many times as many seeds
# unpaired runs would need for an interval of the same width: `2 · (sd of loss / sd of difference)²`.


# %%
def pairing(campaign):
    rows = paired_rows(campaign, layout).dropna(subset=[REDUCTION])
    rows = rows.assign(difference=rows["control"] - rows["value"])
    keys = [*layout.order, layout.arm]
    table = rows.groupby(keys, sort=False)[["value", "difference"]].std().reset_index()
    table["seeds saved by pairing, ×"] = 2 * (table["value"] / table["difference"]) ** 2
    return table.rename(columns={"value": "sd of loss", "difference": "sd of difference"}).sort_values(keys)


def per_seed(campaign):
    rows = paired_rows(campaign, layout).dropna(subset=[REDUCTION])
    rows = rows[(rows["track"] == "main") & (rows[layout.arm] != "initial")]
    table = rows.pivot_table(index=["schedule", "seed"], columns=layout.arm, values=REDUCTION, sort=False)
    return (100 * table.sort_index()).map("{:+.3f}".format).reset_index()


for campaign in evidence:
    display(Markdown(f"### {campaign.scope}\n\nReduction against raw weights, %, seed by seed (track main):"))
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
def documents(campaign, arm="ema_optimal"):
    examples = campaign.examples
    examples = examples[(examples["track"] == "main") & (examples["metric"] == layout.metric)]
    examples = examples.assign(nats=examples["value"] * examples["tokens"])
    keys = ["schedule", "example", "seed", "arm"]
    totals = examples[examples["arm"].isin([arm, layout.control])].groupby(keys)[["nats", "tokens"]].sum()
    losses = (totals["nats"] / totals["tokens"]).unstack("arm")
    reduction = (losses[layout.control] - losses[arm]) / losses[layout.control]
    return reduction.groupby(["schedule", "example"]).mean().rename(REDUCTION).reset_index()


for campaign in evidence:
    table = documents(campaign)
    gains = table.groupby("schedule")[REDUCTION]
    summary = pd.DataFrame({"documents": gains.size(), "that gain": gains.agg(lambda g: int((g > 0).sum()))})
    display(Markdown(f"### {campaign.scope}\n\n{as_markdown(summary.reset_index().astype(str))}"))
    display(Image(to_png(document_figure(table, "schedule", f"Gain by document\n{campaign.scope}"))))

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
