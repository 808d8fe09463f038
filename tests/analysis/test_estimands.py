"""Every estimand against a case worked by hand, and every refusal to estimate."""

from __future__ import annotations

import math
import re

import pandas as pd
import pytest

from analysis.estimands import selectors, successes
from experiments.harness.claims import (
    Difference,
    Exact,
    ExactRatio,
    Interaction,
    LogLogSlope,
    Proportion,
    Rate,
    Ratio,
    Regret,
    RelativeReduction,
    SelectedReduction,
)
from tests.analysis.tidy_rows import estimate, refusal, row

EMA, RAW = {"arm": "ema"}, {"arm": "raw"}
REDUCTION = RelativeReduction("eval_loss", treatment=EMA, control=RAW)


def two_arms(treatment, control, **conditions):
    return [
        row(value, seed=seed, arm=arm, **conditions)
        for arm, values in (("ema", treatment), ("raw", control))
        for seed, value in enumerate(values)
    ]


def test_relative_reduction_is_paired_and_read_at_the_last_step():
    rows = [
        *two_arms([1.8, 4.4], [2.0, 4.0]),
        *two_arms([9.0, 1.0], [5.0, 5.0], step=50),
    ]
    # seed 0: (2.0 - 1.8) / 2.0 = 0.1; seed 1: (4.0 - 4.4) / 4.0 = -0.1
    assert estimate(REDUCTION, rows[::-1]) == pytest.approx({0: 0.1, 1: -0.1})


def test_arms_may_be_separate_trials_with_different_last_steps():
    rows = [
        row(1.5, trial="a", step=80, arm="ema"),
        row(9.0, trial="a", step=40, arm="ema"),
        row(2.0, trial="b", step=100, arm="raw"),
    ]
    assert estimate(REDUCTION, rows) == pytest.approx({0: 0.25})


def test_where_restricts_the_rows():
    rows = two_arms([1.5], [2.0], schedule="cosine") + two_arms([2.0], [2.0], schedule="linear")
    cosine = RelativeReduction("eval_loss", EMA, RAW, where={"schedule": "cosine"})
    assert estimate(cosine, rows) == pytest.approx({0: 0.25})


@pytest.mark.parametrize("level", ["0.999", 0.999, 2, True])
def test_selectors_compare_strings_floats_ints_and_booleans(level):
    rows = [row(1.0, x=level), row(2.0, arm="raw"), row(7.0, x="other")]
    assert estimate(RelativeReduction("eval_loss", {"x": level}, RAW), rows) == pytest.approx({0: 0.5})


def test_regret_is_against_the_best_rival_of_each_seed():
    rows = [
        row(value, seed=seed, decay=decay)
        for decay, values in ((0.9, (2.0, 2.0)), (0.99, (2.5, 1.6)), (0.999, (2.2, 1.5)))
        for seed, value in enumerate(values)
    ]
    regret = Regret("eval_loss", choice={"decay": 0.999}, rivals=({"decay": 0.9}, {"decay": 0.99}))
    # seed 0: 2.2 / min(2.0, 2.5) - 1 = 0.1; seed 1: 1.5 / min(2.0, 1.6) - 1 = -0.0625
    assert estimate(regret, rows) == pytest.approx({0: 0.1, 1: -0.0625})


def test_exact_ratio_is_per_trial():
    rows = [
        row(value, trial=trial, seed=0, metric=metric, ratio=ratio)
        for trial, ratio, top, bottom in (("a", 0.5, 40, 100), ("b", 0.5, 45, 90), ("c", 0.75, 1, 100))
        for metric, value in (("trainable_params", top), ("total_params", bottom))
    ]
    ratio = ExactRatio("trainable_params", "total_params", where={"ratio": 0.5})
    assert estimate(ratio, rows) == pytest.approx({"a": 0.4, "b": 0.5})


def test_an_unknown_column_is_refused_with_near_misses():
    message = refusal(RelativeReduction("eval_loss", {"armm": "ema"}, RAW), two_arms([1.0], [2.0]))
    assert "unknown column 'armm'; did you mean arm?" in message
    message = refusal(RelativeReduction("eval_loss", EMA, RAW, where={"track": "lm"}), two_arms([1.0], [2.0]))
    assert "a selector must name a condition that was recorded" in message
    assert "'track'" in message


def test_an_unknown_metric_is_refused():
    message = refusal(RelativeReduction("eval_lost", EMA, RAW), two_arms([1.0], [2.0]))
    assert "unknown metric 'eval_lost'; did you mean eval_loss?" in message


def test_an_arm_without_rows_is_refused():
    message = refusal(RelativeReduction("eval_loss", {"arm": "sma"}, RAW), two_arms([1.0], [2.0]))
    assert "got none for treatment {arm=sma}" in message


def test_an_ambiguous_selector_names_the_conditions_that_differ():
    rows = two_arms([1.0], [2.0], schedule="cosine", split="eval") + two_arms(
        [1.5], [2.5], schedule="linear", split="eval"
    )
    message = refusal(REDUCTION, rows)
    assert "one row per seed, got 2 for treatment {arm=ema} that differ in schedule; name" in message


def test_ambiguity_over_trials_of_one_seed_is_seen_though_their_last_steps_differ():
    rows = [row(1.0, trial="a", step=100, arm="ema"), row(2.0, trial="b", step=90, arm="ema"), row(3.0, arm="raw")]
    assert "got 2 for treatment {arm=ema} that differ in step" in refusal(REDUCTION, rows)


def test_repeated_rows_are_refused():
    rows = two_arms([1.0], [2.0])
    assert "that differ in no recorded condition" in refusal(REDUCTION, rows + rows)


def test_unpaired_seeds_are_named():
    message = refusal(REDUCTION, two_arms([1.0, 1.0], [2.0, 2.0, 2.0, 2.0]))
    assert "paired within seed, but treatment {arm=ema} lacks seed 2, 3" in message
    regret = Regret("eval_loss", EMA, (RAW,))
    assert "rival 1 {arm=raw} lacks seed 1" in refusal(regret, two_arms([1.0, 1.0], [2.0]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value):
    message = refusal(REDUCTION, two_arms([1.0, value], [2.0, 2.0]))
    assert f"must be finite, got {value} for treatment {{arm=ema}} (seed 1, step 100)" in message


@pytest.mark.parametrize("control", [0.0, -2.0])
def test_a_denominator_that_is_not_positive_is_refused(control):
    rows = two_arms([1.0], [control])
    assert f"positive denominator, got {control:g} for eval_loss of the control" in refusal(REDUCTION, rows)
    assert "eval_loss of the best rival" in refusal(Regret("eval_loss", EMA, (RAW,)), rows)


def test_a_regret_needs_rivals():
    assert "at least 1 rival, got none" in refusal(Regret("eval_loss", EMA, ()), two_arms([1.0], [2.0]))


def test_an_exact_ratio_needs_each_metric_once_per_trial():
    top = [row(1.0, trial="a", metric="top"), row(1.0, trial="b", metric="top")]
    bottom = [row(2.0, trial="a", metric="bottom")]
    ratio = ExactRatio("top", "bottom")
    assert "paired within trial, but bottom lacks trial b" in refusal(ratio, top + bottom)
    twice = [row(2.0, trial=t, metric="bottom", step=step) for t in "ab" for step in (1, 2)]
    assert "one row per trial_id, got 2 for bottom that differ in step" in refusal(ratio, top + twice)
    zero = [row(0.0, trial=t, metric="bottom") for t in "ab"]
    assert "positive denominator, got 0 for bottom" in refusal(ratio, top + zero)


SLOPE = LogLogSlope("error", {"arm": "mean"})
STEPS = [round(10 ** (2 + i / 5)) for i in range(16)]


def power_law(exponent, seed=0, **conditions):
    conditions = {"arm": "mean", "forgetting": 50.0, **conditions}
    return [row(3 * s**exponent, seed=seed, step=s, metric="error", **conditions) for s in STEPS]


def test_the_slope_of_a_power_law_is_its_exponent():
    rows = power_law(-1.0) + power_law(-0.75, seed=1)
    assert estimate(SLOPE, rows) == pytest.approx({0: -1.0, 1: -0.75})


def test_a_slope_is_that_of_the_last_decade():
    bent = [{**r, "value": r["value"] * (1.2 if r["step"] < 100_000 / 10 else 1.0)} for r in power_law(-1.0)]
    assert estimate(SLOPE, bent) == pytest.approx({0: -1.0})
    late = [{**r, "value": r["value"] * (9 if r["step"] < 100_000 / 100 else 1)} for r in power_law(-1.0)]
    assert estimate(SLOPE, late) == pytest.approx({0: -1.0}), "what came two decades before decided"


@pytest.mark.parametrize(
    "value", [lambda s: s**-2.0 + 1e-8, lambda s: 1 / (1 + s**2 / 1e8)], ids=["flatter", "steeper"]
)
def test_a_slope_that_the_decade_before_does_not_share_is_refused(value):
    rows = [row(value(s), step=s, metric="error", arm="mean", forgetting=50.0) for s in STEPS]
    assert "must agree with that of the decade before within 0.1" in refusal(SLOPE, rows)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"forgetting": 9.0}, "must have forgotten its start .* ≥ 10.* got 9 at step 10000"),
        ({"horizon_steps": 1001.0}, "must open after 10 averaging horizons .10010 steps., got 10000"),
    ],
)
def test_gates_of_a_slope(conditions, message):
    assert re.search(message, refusal(SLOPE, power_law(-1.0, **conditions)))
    assert re.search(message, refusal(SLOPE, power_law(-1.0) + power_law(-1.0, seed=1, **conditions)))


def test_gates_of_a_slope_are_closed_intervals():
    rows = power_law(-1.0, forgetting=10.0, horizon_steps=1000.0)
    assert estimate(SLOPE, rows) == pytest.approx({0: -1.0})


def test_a_slope_without_the_condition_that_its_gate_needs():
    rows = [{k: v for k, v in r.items() if k != "forgetting"} for r in power_law(-1.0)]
    assert "needs the condition forgetting" in refusal(SLOPE, rows)
    free = LogLogSlope("error", {"arm": "mean"}, min_forgetting=None)
    assert estimate(free, rows) == pytest.approx({0: -1.0})


def test_a_slope_needs_positive_values_at_several_steps():
    rows = power_law(-1.0)
    assert "needs positive values, got 0" in refusal(SLOPE, [*rows[:-1], {**rows[-1], "value": 0.0}])
    assert "at least 4 recorded steps in each of the last two decades, got 1" in refusal(SLOPE, rows[-1:])


def test_an_exact_estimand_has_one_value_per_trial():
    rows = [{**r, "trial_id": name} for name, e in (("b", -0.5), ("a", -1.0)) for r in power_law(e)]
    assert estimate(Exact(SLOPE), rows) == pytest.approx({"a": -1.0, "b": -0.5})
    assert Exact(LogLogSlope("error", {}, where={"world": "quadratic"})).where == {"world": "quadratic"}


SELECTED = SelectedReduction("eval_loss", ({"arm": "ema"}, {"arm": "emb"}), (RAW,))


def split_rows(arm, step, validation, test, seed=0):
    return [
        row(value, seed=seed, step=step, arm=arm, split=split)
        for split, value in (("validation", validation), ("test", test))
    ]


def test_selected_reduction_chooses_on_one_split_and_reports_on_the_other():
    rows = [
        *split_rows("ema", 50, 1.9, 1.0),  # the best on test, not chosen
        *split_rows("ema", 100, 1.8, 1.5),  # chosen: least on validation
        *split_rows("emb", 100, 1.85, 0.5),
        *split_rows("raw", 50, 2.0, 3.0),  # chosen checkpoint of the control
        *split_rows("raw", 100, 2.1, 1.0),
    ]
    assert estimate(SELECTED, rows) == pytest.approx({0: (3.0 - 1.5) / 3.0})


def test_a_selection_takes_the_first_of_equals_in_the_order_of_the_claim():
    rows = [*split_rows("emb", 50, 1.0, 7.0), *split_rows("ema", 50, 1.0, 1.0), *split_rows("raw", 50, 2.0, 2.0)]
    assert estimate(SELECTED, rows) == pytest.approx({0: 0.5})


def test_what_is_chosen_must_be_reported():
    rows = [*split_rows("ema", 50, 1.9, 1.0), *split_rows("emb", 50, 2.0, 1.0), *split_rows("raw", 50, 2.0, 3.0)]
    rows.append(row(1.0, step=20, arm="ema", split="validation"))
    message = refusal(SELECTED, rows)
    assert "treatment {arm=ema}, chosen at step 20 in seed 0, has no row for report_on {split=test} there" in message


def test_a_selection_needs_arms_and_pairs():
    rows = [*split_rows("ema", 50, 1.9, 1.0), *split_rows("emb", 50, 2.0, 1.0), *split_rows("raw", 50, 2.0, 3.0)]
    assert "at least 1 arm, got none for the control" in refusal(SelectedReduction("eval_loss", (EMA,), ()), rows)
    assert "control lacks seed 1" in refusal(
        SELECTED, rows + split_rows("ema", 50, 1.0, 1.0, seed=1) + split_rows("emb", 50, 1.0, 1.0, seed=1)
    )


INTERACTION = Interaction(REDUCTION, {"schedule": "constant"}, {"schedule": "cosine"})


def test_an_interaction_is_a_difference_of_reductions_within_the_seed():
    rows = two_arms([1.0, 1.5], [2.0, 2.0], schedule="constant") + two_arms([1.8, 2.0], [2.0, 2.0], schedule="cosine")
    # seed 0: 0.5 - 0.1; seed 1: 0.25 - 0
    assert estimate(INTERACTION, rows) == pytest.approx({0: 0.4, 1: 0.25})


def test_an_interaction_of_selected_reductions():
    rows = [
        {**r, "data": data}
        for data, gain in (("small", 0.5), ("large", 0.25))
        for arm, loss in (("ema", 2 * (1 - gain)), ("emb", 9.0), ("raw", 2.0))
        for r in split_rows(arm, 50, loss, loss)
    ]
    interaction = Interaction(SELECTED, {"data": "small"}, {"data": "large"})
    assert estimate(interaction, rows) == pytest.approx({0: 0.25})


def test_both_conditions_of_an_interaction_need_the_same_seeds():
    rows = two_arms([1.0, 1.5], [2.0, 2.0], schedule="constant") + two_arms([1.8], [2.0], schedule="cosine")
    assert "paired within seed, but second {schedule=cosine} lacks seed 1" in refusal(INTERACTION, rows)


def test_what_varies_in_an_interaction_is_not_held_fixed():
    held = Interaction(
        RelativeReduction("eval_loss", EMA, RAW, {"schedule": "constant"}), INTERACTION.first, INTERACTION.second
    )
    assert "must not be held in its where, got schedule in both" in refusal(
        held, two_arms([1.0], [2.0], schedule="constant")
    )


def test_ratio_is_paired():
    rows = two_arms([1.0, 3.0], [2.0, 4.0])
    assert estimate(Ratio("eval_loss", EMA, RAW), rows) == pytest.approx({0: 0.5, 1: 0.75})
    assert "positive denominator, got 0 for eval_loss of the denominator" in refusal(
        Ratio("eval_loss", EMA, RAW), two_arms([1.0], [0.0])
    )


def test_difference_is_paired():
    rows = two_arms([-1.0, 3.0], [2.0, 2.5])
    assert estimate(Difference("eval_loss", EMA, RAW), rows) == pytest.approx({0: -3.0, 1: 0.5})
    unpaired = [*rows, row(1.0, seed=2, arm="raw")]
    assert "lacks seed 2" in refusal(Difference("eval_loss", EMA, RAW), unpaired)


def test_a_rate_is_per_trial_and_counts_ones():
    rows = [
        row(value, seed=0, trial=trial, metric="detected") for trial, value in zip("abcd", [1, 0, 1, 1], strict=True)
    ]
    rows.append(row(0.0, trial="a", step=1, metric="detected"))
    assert estimate(Rate("detected"), rows) == {"a": 1, "b": 0, "c": 1, "d": 1}
    assert successes(Rate("detected"), pd.DataFrame(rows)) == (3, 4)
    rows.append(row(0.5, trial="e", metric="detected"))
    assert "outcomes 0 or 1, got 0.5 for detected" in refusal(Rate("detected"), rows)


def counts(hits, attempts, trial="a"):
    return [row(hits, trial=trial, metric="hits"), row(attempts, trial=trial, metric="tries")]


def test_a_proportion_sums_counts_over_trials():
    rows = counts(1, 10) + counts(30, 40, trial="b")
    assert estimate(Proportion("hits", "tries"), rows) == pytest.approx({"a": 0.1, "b": 0.75})
    assert successes(Proportion("hits", "tries"), pd.DataFrame(rows)) == (31, 50)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (counts(3, 2), "at most as many successes as attempts, got 3 of 2 in trial a; exchange hits and tries"),
        (counts(0.5, 2), "whole counts, got 0.5 for hits"),
        (counts(0, 0), "positive denominator, got 0 for tries"),
        (counts(1, 2) + counts(1, 2, "b")[:1], "paired within trial, but tries lacks trial b"),
    ],
)
def test_counts_that_are_none(rows, message):
    assert message in refusal(Proportion("hits", "tries"), rows)


def test_a_measured_slope_of_constant_values_is_refused_but_a_computed_one_is_zero():
    rows = power_law(-1.0) + power_law(0.0, seed=1)
    assert "got exactly 3 at all 6 steps of a decade for arm {arm=mean} in seed 1" in refusal(SLOPE, rows)
    assert estimate(Exact(SLOPE), power_law(0.0)) == pytest.approx({"trial-0": 0.0})


def test_selectors_are_the_arms_of_an_estimand():
    assert selectors(SELECTED) == [{"arm": "ema"}, {"arm": "emb"}, {"arm": "raw"}]
    assert selectors(INTERACTION) == [
        {"arm": "ema", "schedule": "constant"},
        {"arm": "ema", "schedule": "cosine"},
        {"arm": "raw", "schedule": "constant"},
        {"arm": "raw", "schedule": "cosine"},
    ]
    assert selectors(Ratio("m", EMA, RAW)) == selectors(Difference("m", EMA, RAW)) == [EMA, RAW]
    assert selectors(Rate("m")) == selectors(Proportion("a", "b")) == [{}]
    assert selectors(Exact(SLOPE)) == [{"arm": "mean"}]


def test_many_rivals_read_together_give_what_they_give_one_by_one():
    rows = [
        row(value, seed=seed, decay=decay, kind="ema", step=step)
        for decay, values in ((0.9, (2.0, 2.0)), (0.99, (2.5, 1.6)), (0.999, (2.2, 1.5)))
        for seed, value in enumerate(values)
        for step in (50, 100)
    ]
    together = Regret("eval_loss", {"decay": 0.999}, ({"decay": 0.9}, {"decay": 0.99}))
    apart = Regret("eval_loss", {"decay": 0.999}, ({"decay": 0.9, "kind": "ema"}, {"decay": 0.99}))
    assert estimate(together, rows) == estimate(apart, rows)
    assert "rival 2 {decay=0.5}" in refusal(
        Regret("eval_loss", {"decay": 0.9}, ({"decay": 0.99}, {"decay": 0.5})), rows
    )
