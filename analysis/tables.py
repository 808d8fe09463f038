"""Tables of an experiment, byte for byte from its records: ``python -m analysis.tables [experiment]``.

Serves every section of THEORY.md: ``results/tables/<experiment>.md`` (the evidence campaigns of its latest version with
their verdicts; of former ones, where their records lie), ``.csv`` (the tidy numbers of the arm tables) and ``.tex``
(the arm tables with booktabs rules).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from analysis.arms import ALPHA, arm_table, layout_of
from analysis.cells import VERDICT_HEADER, arm_cells, is_numeric, short_arm_cells, verdict_cells, verdict_line
from analysis.costs import cost_markdown
from analysis.estimands import CannotEstimate
from analysis.evidence import in_order
from analysis.formatting import ENGLISH, NO_BREAK_SPACE, format_estimate, format_interval, markdown_table
from analysis.hierarchy import seeds_and_items
from analysis.load import Campaign, load_campaigns
from analysis.sweeps import sweeps_markdown
from analysis.verdicts import NOT_MEASURED, Verdict, judge_campaign
from experiments.harness.claims import RelativeReduction
from experiments.harness.experiment import UserError, experiment_names, load_experiment, unknown

RESULTS = Path(__file__).resolve().parent.parent / "results"

IDENTITY = ("experiment", "version", "scale", "campaign_id")


def markdown(experiment: str, campaigns: Sequence[Campaign], former: Sequence[Campaign] = ()) -> str:
    """The page of one experiment: per campaign an arm table and the verdicts; a line for each of a former version."""
    parts = [f"# {experiment}", "Written by `python -m analysis.tables` from the records; do not edit."]
    for campaign in campaigns:
        parts += [f"## {heading(campaign)}", trials_line(campaign)]
        parts += [*_arm_section(campaign), *_sweeps_section(campaign), *_cost_section(campaign)]
        parts += [*_verdict_section(campaign), *_items_section(campaign)]
    if former:
        lines = [f"- {heading(c)}: {trials_line(c)} Records: `results/{experiment}/v{c.version}/`." for c in former]
        parts += ["## Former versions", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def csv(campaigns: Sequence[Campaign]) -> str:
    """The arm tables of all campaigns as one tidy table, numbers to ten significant digits."""
    frames = []
    for campaign in campaigns:
        table = arm_table_or_reason(campaign)
        if isinstance(table, str):
            continue
        for position, name in enumerate(IDENTITY):
            table.insert(position, name, getattr(campaign, name))
        frames.append(table)
    tidy = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(IDENTITY))
    return str(tidy.round(12).to_csv(index=False, float_format="%.10g", lineterminator="\n"))


def tex(experiment: str, campaigns: Sequence[Campaign]) -> str:
    """The arm tables with booktabs rules, one ``table`` per campaign."""
    parts = [f"% {experiment}: written by python -m analysis.tables from the records; do not edit."]
    for campaign in campaigns:
        table = arm_table_or_reason(campaign)
        if isinstance(table, str):
            parts.append(f"% {campaign.campaign_id}: {table}")
            continue
        cells = arm_cells(campaign, table)
        lines = [list(cells.columns), *cells.to_numpy().tolist()]
        rows = [" & ".join(map(_tex, line)) + r" \\" for line in lines]
        columns = "".join("r" if is_numeric(cells[name]) else "l" for name in cells.columns)
        begin = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(heading(campaign) + '. ' + _note(campaign))}}}"]
        body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
        parts.append("\n".join([*begin, *body, r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def summary(experiment: str, results: Path, campaign_id: str | None = None) -> str:
    """A short table and the verdict lines, for the terminal at the end of a run.

    Args:
        experiment: its name.
        results: folder of the records.
        campaign_id: show this campaign alone; None shows all, smoke ones last.

    Returns:
        Markdown that reads well as plain text.
    """
    campaigns, problems = load_campaigns(results, experiment)
    shown = [*in_order(campaigns), *(campaign for campaign in campaigns if not campaign.is_evidence)]
    parts = list(problems)
    for campaign in shown:
        if campaign_id not in (None, campaign.campaign_id):
            continue
        table = arm_table_or_reason(campaign)
        parts += [heading(campaign), trials_line(campaign)]
        parts.append(table if isinstance(table, str) else as_markdown(short_arm_cells(campaign, table)))
        if campaign.is_evidence:
            measured = [verdict for verdict in judged(campaign) if not verdict.reason.endswith(NOT_MEASURED)]
            parts.append("\n".join(verdict_line(verdict) for verdict in measured))
        else:
            parts.append("A smoke run proves that the code runs. It is not evidence and feeds no verdict.")
    return "\n\n".join(part for part in parts if part) or f"no records of {experiment} below {results}"


def heading(campaign: Campaign) -> str:
    """Scope first, since it travels with every number."""
    return f"{campaign.scope} (version {campaign.version}, campaign {campaign.campaign_id})"


def trials_line(campaign: Campaign) -> str:
    """How many planned trials succeeded, and what became of the others."""
    ok = {record.trial_id for record in campaign.ok_records}
    failed = [record for record in campaign.records if record.trial_id not in ok]
    fates = Counter("failed a manipulation check" if r.status == "ok" else r.status for r in failed)
    if missing := campaign.n_planned - len(campaign.records):
        fates["not run"] = missing
    listed = ", ".join(f"{count} {fate}" for fate, count in sorted(fates.items()))
    return f"{len(ok)} of {campaign.n_planned} planned trials succeeded" + (f" ({listed})." if listed else ".")


def judged(campaign: Campaign) -> list[Verdict]:
    """Verdicts on today's claims; none for a smoke run, an older version or an experiment that is gone."""
    if not campaign.is_evidence or campaign.experiment not in experiment_names():
        return []
    experiment = load_experiment(campaign.experiment)
    return judge_campaign(experiment.claims, campaign) if experiment.version == campaign.version else []


def write_tables(experiment: str, results: Path, out: Path) -> list[Path]:
    """Write the three files of one experiment; returns their paths, none where there is no evidence."""
    recorded = in_order(load_campaigns(results, experiment)[0])
    if not recorded:
        return []
    former = [campaign for campaign in recorded if campaign.version < recorded[-1].version]
    campaigns = recorded[len(former) :]
    texts = {"md": markdown(experiment, campaigns, former), "csv": csv(campaigns), "tex": tex(experiment, campaigns)}
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{experiment}.{suffix}" for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text, encoding="utf-8", newline="\n")
    return paths


def arm_table_or_reason(campaign: Campaign) -> pd.DataFrame | str:
    """The arm table, or one line that says why there is none."""
    try:
        return arm_table(campaign, layout_of(campaign.experiment))
    except CannotEstimate as error:
        return f"No arm table: {error}."


def as_markdown(cells: pd.DataFrame) -> str:
    """A frame of text cells as Markdown, columns of numbers aligned to the right."""
    rows = list(cells.itertuples(index=False, name=None))
    return markdown_table(list(cells.columns), rows, [is_numeric(cells[name]) for name in cells.columns])


def options_of(artefacts: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of a command line that writes artefacts (``tables``, ``figures``) from the records."""
    parser = argparse.ArgumentParser(
        prog=f"python -m analysis.{artefacts}", description=f"{artefacts.capitalize()} from the records."
    )
    parser.add_argument("experiment", nargs="?", help="name of one experiment; all by default")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--out", type=Path, help=f"folder of the {artefacts} (default: RESULTS/{artefacts})")
    options = parser.parse_args(argv)
    options.out = options.out or options.results / artefacts
    return options


def experiments_with_results(results: Path, wanted: str | None) -> list[str]:
    """Names of the experiments that have records, or the one that is wanted.

    Raises:
        UserError: if the wanted one is neither declared nor recorded.
    """
    recorded = sorted({campaign.experiment for campaign in load_campaigns(results)[0]})
    if wanted is None:
        return recorded
    known = {*experiment_names(), *recorded}
    if wanted not in known:
        raise UserError(unknown("experiment", wanted, known))
    return [wanted]


def _arm_section(campaign: Campaign) -> Iterator[str]:
    table = arm_table_or_reason(campaign)
    if isinstance(table, str):
        yield table
    else:
        yield as_markdown(arm_cells(campaign, table))
        yield _note(campaign)


def _sweeps_section(campaign: Campaign) -> Iterator[str]:
    if text := sweeps_markdown(campaign):
        yield "### Studies"
        yield text


def _cost_section(campaign: Campaign) -> Iterator[str]:
    if text := cost_markdown(campaign, "en", ENGLISH):
        yield "### Cost of a step"
        yield text


def _note(campaign: Campaign) -> str:
    layout = layout_of(campaign.experiment)
    if not layout.control:
        return "Means over trials."
    return (
        f"Reduction: ({layout.control} − arm) / {layout.control} of {layout.metric}, paired within seed, mean over "
        "seeds. Its 95% t-interval is per arm and not adjusted for the number of arms."
    )


def _items_section(campaign: Campaign) -> Iterator[str]:
    """Training seeds and test documents as two sources of variation, where outcomes by document were recorded."""
    rows = []
    for verdict in judged(campaign):
        estimand = verdict.claim.estimand
        if not isinstance(estimand, RelativeReduction):
            continue
        try:
            apart = seeds_and_items(estimand, campaign, ALPHA)
        except CannotEstimate:
            continue
        intervals = [apart.over_seeds, apart.over_items, apart.over_both]
        rows.append(
            [
                verdict.claim.id,
                format_estimate(estimand, apart.over_seeds.value, ENGLISH),
                *(format_interval(estimand, (each.low, each.high), ENGLISH) for each in intervals),
                f"{apart.over_seeds.n} × {apart.over_items.n}",
            ]
        )
    if rows:
        yield "### Seeds and documents apart"
        header = ("claim", "reduction", "other seeds", "other documents", "both", "seeds × documents")
        yield markdown_table(header, rows, [False, *[True] * 5], padded=False)
        yield (
            "95% intervals of one claim each, not adjusted: over training seeds, same documents (what verdicts go "
            "by), over documents with the same seeds, over both (crossed random effects)."
        )


def _verdict_section(campaign: Campaign) -> Iterator[str]:
    verdicts = judged(campaign)
    if not verdicts:
        yield "No verdicts: the claims of this version are no longer declared."
        return
    yield "### Verdicts"
    measured = [verdict for verdict in verdicts if not verdict.reason.endswith(NOT_MEASURED)]
    rows = [verdict_cells(verdict, campaign) for verdict in measured]
    yield markdown_table(VERDICT_HEADER, rows, [False, True, False, True, True, True, True, False, False], padded=False)
    levels = sorted({1 - v.simultaneous_alpha for v in verdicts if v.simultaneous_alpha is not None})
    each = " or ".join(ENGLISH.share(level) for level in levels) or "—"
    yield (
        f"Intervals hold simultaneously over the claims (each at {each}); for an exact value, the range over trials. "
        "p: sign-flip test of the nearest edge, not adjusted. n: seeds; trials for an exact "
        "value, attempts for a rate or a proportion."
    )
    if absent := [verdict.claim.id for verdict in verdicts if verdict not in measured]:
        yield f"{NOT_MEASURED.capitalize()}: {', '.join(absent)}."


def _tex(text: object) -> str:
    """Escape what TeX reserves and spell out the signs that the formatting uses."""
    reserved = {sign: f"\\{sign}" for sign in "_%&#$"}
    signs = {"−": "$-$", "±": r"$\pm$", "·": r"$\cdot$", "×": r"$\times$", "<": "$<$", "—": "--", "–": "--"}
    return "".join({**reserved, **signs, NO_BREAK_SPACE: "~"}.get(sign, sign) for sign in str(text))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: writes the tables of one experiment or of all."""
    options = options_of("tables", argv)
    try:
        names = experiments_with_results(options.results, options.experiment)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for problem in load_campaigns(options.results, options.experiment)[1]:
        print(problem, file=sys.stderr)
    for name in names:
        paths = write_tables(name, options.results, options.out)
        print("\n".join(map(str, paths)) or f"{name}: no evidence yet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
