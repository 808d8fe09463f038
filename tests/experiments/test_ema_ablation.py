"""The experiment's own promises: its plan, its pairs, its manipulation checks, its bitwise repeatability."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from experiments.ema_ablation import EXPERIMENT, SCALES, trials
from experiments.harness import bad_batch
from experiments.harness.averaging import LENGTHS, posthoc_arm
from experiments.harness.causal_lm import prepare
from experiments.harness.evaluation import held_out_loss
from experiments.harness.experiment import Preempted
from experiments.harness.late_losses import observe_late_losses, residual_sd
from experiments.harness.posthoc import CurveCallback
from experiments.harness.record import Measurements
from forge.ema import EMACallback, EMAModel, compute_optimal_decay
from tests.experiments import stopping

ARMS = ("initial", "raw", "ema_0.99", "ema_0.999", "ema_0.9999", "ema_optimal")
TINY = {"batch_size": 2, "validation_blocks": 2, "test_blocks": 4, "late_evaluations": 2}


def specs(schedules=("constant",), seeds=1, **changes):
    main = dataclasses.replace(SCALES["smoke"].main, **{"steps": (6,), **TINY, **changes})
    settings = dataclasses.replace(SCALES["smoke"], seeds=seeds, main=main, length=None, schedules=schedules)
    return trials(settings, "smoke")


class Context:
    def __init__(self, work_dir):
        self.work_dir = work_dir

    def report(self, step, total, **figures):
        return None

    def should_stop(self):
        return False

    def wandb_run_id(self):
        return None


@pytest.fixture
def measure(tmp_path_factory):
    return lambda spec: EXPERIMENT.run_trial(spec, Context(tmp_path_factory.mktemp("work")))


def values(measurements, **conditions):
    rows = [o.model_dump() for o in measurements.observations]
    return {
        (row.get("arm"), row["step"]): row["value"]
        for row in rows
        if all(row.get(key) == value for key, value in conditions.items())
    }


@pytest.mark.parametrize(
    ("scale", "main", "length"), [("smoke", 2, 2), ("laptop", 3, 0), ("cpu", 5, 12), ("gpu", 3, 3), ("paper", 5, 5)]
)
def test_the_plan_is_tracks_by_lengths_by_schedules_by_seeds(scale, main, length):
    plan = trials(SCALES[scale], scale)
    assert len({spec.trial_id for spec in plan}) == len(plan) == 2 * main + 4 * length
    assert len({spec.campaign_id for spec in plan}) == 1
    assert [spec.seed for spec in plan] == sorted(spec.seed for spec in plan), "an early stop must leave whole pairs"
    for seed in range(max(main, length)):
        tracks = Counter(spec.factors["track"] for spec in plan if spec.seed == seed)
        assert tracks == Counter({"main": 2 * (seed < main), "length": 4 * (seed < length)})


def test_more_seeds_continue_a_campaign():
    two, three = specs(seeds=2), specs(seeds=3)
    assert [s.trial_id for s in three][:2] == [s.trial_id for s in two]
    assert three[0].campaign_id == two[0].campaign_id != specs(batch_size=3)[0].campaign_id


def test_arms_of_a_seed_are_paired_and_seeds_differ(measure):
    constant, cosine, other = (measure(spec) for spec in [*specs(("constant", "cosine")), specs(seeds=2)[1]])
    assert constant.digests == cosine.digests != other.digests
    assert constant.digests["data"] == other.digests["data"]
    initial = {"metric": "eval_loss", "arm": "initial"}
    assert values(constant, **initial) == values(cosine, **initial) != values(other, **initial)
    raw = {"metric": "eval_loss", "arm": "raw", "split": "test"}
    assert values(constant, **raw) != values(cosine, **raw)
    for measurements in (constant, cosine, other):
        assert all(check.passed for check in measurements.checks) and measurements.diverged is None


def test_the_same_trial_twice_is_bitwise_the_same(measure):
    (spec,) = specs()
    first, second = measure(spec), measure(spec)
    for part in ("examples", "checks", "digests", "tokens"):
        assert getattr(first, part) == getattr(second, part)
    timeless = [[row for row in measured.observations if row.unit != "s"] for measured in (first, second)]
    assert timeless[0] == timeless[1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    (spec,) = specs()
    return EXPERIMENT.run_trial(spec, Context(tmp_path_factory.mktemp("work")))


def test_every_arm_is_evaluated_with_its_conditions(measured):
    rows = [o.model_dump() for o in measured.observations]
    tests = {row["arm"]: row for row in rows if row.get("split") == "test" and row["metric"] == "eval_loss"}
    lengths = {posthoc_arm(width) for width in LENGTHS}
    assert set(tests) == {*ARMS, *lengths, "posthoc_chosen", "posthoc_nearby"}
    assert tests["raw"]["horizon_steps"] == 1 and tests["initial"]["step"] == 0
    assert tests["ema_0.99"]["decay"] == 0.99
    assert tests["ema_0.99"]["horizon_steps"] == pytest.approx(100)
    assert tests["ema_0.99"]["initial_weight_share"] == pytest.approx(0.99**6)
    assert tests["ema_optimal"]["decay"] == compute_optimal_decay(6)
    late = [(row["arm"], row["step"]) for row in rows if row.get("split") == "validation"]
    followed = [(arm, step) for arm in ARMS if arm != "initial" for step in (4, 6)]
    assert sorted(late) == sorted([*followed, *((arm, 6) for arm in lengths)])


def test_an_interrupted_trial_measures_the_same(measured, tmp_path):
    (spec,) = specs()
    with pytest.raises(Preempted):
        EXPERIMENT.run_trial(spec, stopping.Context(tmp_path, stop_at=4))
    resumed = EXPERIMENT.run_trial(spec, Context(tmp_path))
    for part in ("examples", "checks", "digests", "tokens"):
        assert getattr(resumed, part) == getattr(measured, part)
    timeless = [[row for row in each.observations if row.unit != "s"] for each in (resumed, measured)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(("kept_step", "goes_on"), [(4, True), (2, False)])
def test_the_clock_of_the_curve_goes_on_where_the_checkpoint_is(tmp_path, kept_step, goes_on):
    """Seconds that belong to another step than that of the checkpoint are lost with it."""
    (spec,) = specs()
    with pytest.raises(Preempted):
        EXPERIMENT.run_trial(spec, stopping.Context(tmp_path, stop_at=4))
    clock = tmp_path / "curve_seconds.json"
    assert json.loads(clock.read_text())["step"] == 4
    clock.write_text(json.dumps({"step": kept_step, "seconds": {"steps": 1e6, "following": 0.0}}))
    resumed = EXPERIMENT.run_trial(spec, Context(tmp_path))
    (steps,) = (o.value for o in resumed.observations if o.metric == "run_part_sec" and o.part == "steps")
    assert (steps > 1e6) == goes_on


def test_version_2_stores_rounded_weights(tmp_path):
    """All its records do: half-precision snapshots without the weights that they would be relative to."""
    EXPERIMENT.run_trial(specs()[0], Context(tmp_path))
    stored = sorted(path.name for path in (tmp_path / "snapshots").iterdir())
    assert EXPERIMENT.version == 2 and stored[0].startswith("step-") and "start.safetensors" not in stored


def test_lengths_are_recorded_with_what_they_are(measured):
    rows = [o.model_dump() for o in measured.observations if o.metric == "eval_loss"]
    curve = {row["sigma_rel"]: row for row in rows if "sigma_rel" in row and row["split"] == "test"}
    assert tuple(sorted(curve)) == LENGTHS
    ages = [curve[width]["mean_age_steps"] for width in LENGTHS]
    assert ages == sorted(ages) and ages[0] >= 1 and ages[-1] < 3.5, "the uniform average of six steps is 3.5 old"
    assert all(0 <= row["profile_error"] < 0.1 for row in curve.values()), "three snapshots in six steps"
    losses = [curve[width]["value"] for width in LENGTHS]
    raw, initial = (values(measured, metric="eval_loss", split="test")[arm] for arm in (("raw", 6), ("initial", 0)))
    assert losses[0] == pytest.approx(raw, rel=1e-3) and losses == sorted(losses), "so short a run: longer is older"
    assert losses[-1] < initial


def test_the_chosen_length_is_best_on_validation_and_the_worst_is_near_it(measured):
    loss = values(measured, metric="eval_loss", split="validation")
    of_width = {width: loss[posthoc_arm(width), 6] for width in LENGTHS}
    chosen, nearby = (
        values(measured, metric="chosen_sigma_rel")[arm, 6] for arm in ("posthoc_chosen", "posthoc_nearby")
    )
    assert of_width[chosen] == min(of_width.values())
    tested = values(measured, metric="eval_loss", split="test")
    near = [width for width in LENGTHS if 0.49 < width / chosen < 2.04]
    assert tested["posthoc_nearby", 6] == max(tested[posthoc_arm(width), 6] for width in near)
    assert nearby in near and tested["posthoc_chosen", 6] == tested[posthoc_arm(chosen), 6]
    (inside,) = (
        o.inside for o in measured.observations if o.metric == "chosen_sigma_rel" and o.arm == "posthoc_chosen"
    )
    assert inside == (LENGTHS[0] < chosen < LENGTHS[-1])


def test_what_the_curve_misses_and_costs_is_recorded(measured):
    distance = values(measured, metric="distance_to_followed")
    assert 0 < distance["posthoc", 6] < 0.2 * distance["raw", 6]
    seconds = {o.part: o.value for o in measured.observations if o.metric == "run_part_sec"}
    assert 0 < seconds["following"] < seconds["curve"] and seconds["steps"] > 0
    names = {check.name for check in measured.checks}
    assert {"curve_updates", "curve_snapshots", "curve_equals_raw"} <= names


def test_losses_lie_between_those_of_the_initial_and_the_raw_weights(measured):
    """What the formula says of so short a run: the longer the memory, the nearer to the initial weights."""
    tested = values(measured, metric="eval_loss", split="test")
    loss = {arm: value for (arm, _), value in tested.items() if not arm.startswith("posthoc")}
    order = ["raw", "ema_optimal", "ema_0.99", "ema_0.999", "ema_0.9999", "initial"]
    assert sorted(loss, key=loss.get) == order


def test_a_spread_is_around_the_trend():
    """Residuals (d, −d, −d, d) are orthogonal to every line over four even steps: sd² = 4 d² / 2."""
    losses = {step: 3 - 0.01 * step + 0.02 * sign for step, sign in zip((5, 6, 7, 8), (1, -1, -1, 1), strict=True)}
    assert residual_sd(losses) == pytest.approx(0.02 * math.sqrt(2), rel=1e-9)


def test_the_spread_of_late_losses_is_that_of_the_recorded_ones(measure, measured):
    found = measure(specs(steps=(12,), late_evaluations=5)[0])
    late, spread, log = (
        values(found, metric=metric, split="validation")
        for metric in ("eval_loss", "late_loss_spread", "late_loss_log_spread")
    )
    assert set(spread) == set(log) == {(arm, 12) for arm in ARMS if arm != "initial"}
    for arm, _ in spread:
        losses = {step: loss for (of, step), loss in late.items() if of == arm}
        (squares,) = np.polyfit([*losses], [*losses.values()], deg=1, full=True)[1]
        expected = math.sqrt(squares / (5 - 2))
        assert len(losses) == 5 and spread[arm, 12] == pytest.approx(expected, rel=1e-6)
        assert log[arm, 12] == math.log(spread[arm, 12])
    assert values(measured, metric="late_loss_spread") == {}, "two losses have no spread around a line"


def test_a_late_loss_that_is_not_a_number_is_a_divergence():
    into, rows = Measurements(), [{"step": 4, "eval_loss": 2.0}, {"step": 5, "eval_loss": math.nan}]
    observe_late_losses(into, rows, {"raw": "eval_loss"}, {"raw": {"arm": "raw"}}, 5)
    assert into.diverged == "the validation loss of arm raw at step 5 is nan"


def test_late_losses_without_spread_have_no_logarithm_of_it():
    into, rows = Measurements(), [{"step": step, "eval_loss": 2.0} for step in range(4)]
    observe_late_losses(into, rows, {"raw": "eval_loss"}, {"raw": {"arm": "raw"}}, 3)
    assert [o.metric for o in into.observations] == ["eval_loss"] * 4 + ["late_loss_spread"]


@dataclasses.dataclass
class Seen:
    """What a spy saw of the bad batch."""

    weights: list = dataclasses.field(default_factory=list)
    """Before the step, after it, and after it is undone."""
    average: dict = dataclasses.field(default_factory=dict)
    """Before the step."""
    expected: dict = dataclasses.field(default_factory=dict)
    """After the step, by hand."""


@pytest.fixture
def seen(monkeypatch):
    """Looks on while the bad batch is taken, and takes the same step by hand on a copy."""
    seen, observe, step_on = Seen(), bad_batch.observe_bad_batch, bad_batch.step_on

    def observing(into, run, ingredients, trainer, ema, decay, before):
        seen.average = {name: mean.clone() for name, mean in ema.ema.averages(decay).items()}
        seconds = observe(into, run, ingredients, trainer, ema, decay, before)
        seen.weights.append(copy.deepcopy(ingredients.model.state_dict()))
        assert all(parameter.grad is None for parameter in ingredients.model.parameters())
        return seconds

    def stepping(trainer, batch):
        seen.weights.append(copy.deepcopy(trainer.model.state_dict()))
        seen.expected = by_hand(trainer, batch)
        step_on(trainer, batch)
        seen.weights.append(copy.deepcopy(trainer.model.state_dict()))

    monkeypatch.setattr(bad_batch, "observe_bad_batch", observing)
    monkeypatch.setattr(bad_batch, "step_on", stepping)
    return seen


def by_hand(trainer, batch):
    """The weights after one step of AdamW on a batch, with clipping, from the state of the trainer's own."""
    model = copy.deepcopy(trainer.model).train()
    optimizer = torch.optim.AdamW(model.parameters())
    state = copy.deepcopy(trainer.optimizer.state_dict())
    order = {name: i for i, (name, _) in enumerate(named_in_groups(trainer))}
    state["state"] = {i: state["state"][order[name]] for i, (name, _) in enumerate(model.named_parameters())}
    state["param_groups"] = [{**state["param_groups"][0], "params": list(range(len(order)))}]
    optimizer.load_state_dict(state)
    assert state["param_groups"][0]["lr"] == SCALES["smoke"].main.learning_rate
    logits = model(input_ids=batch).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return model.state_dict()


def named_in_groups(trainer):
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return [(names[id(p)], p) for group in trainer.optimizer.param_groups for p in group["params"]]


def test_the_bad_batch_is_one_more_step_of_the_training_and_is_undone(measure, seen):
    measure(specs()[0])
    before, after, undone = seen.weights
    for name, weight in seen.expected.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-7)
        assert not torch.equal(after[name], before[name])
        assert torch.equal(undone[name], before[name])


def test_the_rise_is_what_a_second_evaluation_gives(measure, seen):
    (spec,) = specs()
    measured = measure(spec)
    tested, rise = (values(measured, metric=m, split="test") for m in ("eval_loss", "bad_batch_loss_rise"))
    assert set(rise) == {("raw", 6), ("ema_optimal", 6)}
    decay, raw = compute_optimal_decay(6), seen.weights[1]
    average = {name: decay * mean + (1 - decay) * raw[name] for name, mean in seen.average.items()}
    main = dataclasses.replace(SCALES["smoke"].main, **TINY)
    for arm, weights in (("raw", raw), ("ema_optimal", average)):
        ingredients = prepare(main, spec.seed)
        ingredients.model.load_state_dict(weights, strict=arm == "raw")
        loss = held_out_loss(ingredients.model, ingredients.test, 4, bad_batch.nullcontext).loss
        assert rise[arm, 6] == pytest.approx(loss / tested[arm, 6] - 1, abs=1e-6)


def test_a_corrupted_batch_is_uniform_over_the_vocabulary_and_drawn_by_its_seed():
    tokens = bad_batch.random_tokens(7, (1_000, 7), 3)
    assert torch.equal(tokens, bad_batch.random_tokens(7, (1_000, 7), 3))
    assert not torch.equal(tokens, bad_batch.random_tokens(7, (1_000, 7), 4))
    counts = tokens.flatten().bincount()
    assert len(counts) == 7 and all(abs(counts - 1_000) < 5 * math.sqrt(1_000)), "within five standard deviations"


def test_everything_else_is_measured_as_if_the_bad_batch_had_not_been(measure, measured, monkeypatch):
    monkeypatch.setattr(bad_batch, "observe_bad_batch", lambda *_: 0.0)
    without = measure(specs()[0])
    rows = [
        [row for row in each.observations if row.unit != "s" and row.metric != "bad_batch_loss_rise"]
        for each in (measured, without)
    ]
    assert rows[0] == rows[1] and len(measured.observations) == len(without.observations) + 2
    for part in ("examples", "digests", "tokens", "memory_bytes"):
        assert getattr(measured, part) == getattr(without, part)


def test_a_bad_batch_that_moves_nothing_fails_the_trial(measure, monkeypatch):
    monkeypatch.setattr(bad_batch, "step_on", lambda *_: None)
    failed = [check.name for check in measure(specs()[0]).checks if not check.passed]
    assert failed == ["bad_batch_moved_the_weights"]


def test_only_fine_tuning_at_a_constant_rate_gets_a_bad_batch(measure):
    cosine = measure(specs(("cosine",))[0])
    (length,) = [s for s in trials(dataclasses.replace(SCALES["smoke"], seeds=1, schedules=("constant",)), "smoke")][
        -1:
    ]
    assert length.factors["track"] == "length"
    for measurements in (cosine, measure(length)):
        assert values(measurements, metric="bad_batch_loss_rise") == {}


def test_optimizer_and_averages_are_gone_when_the_curve_is_evaluated(measure, monkeypatch):
    observe, held = CurveCallback.observe, (torch.optim.Optimizer, EMACallback)
    before = {id(kept) for kept in gc.get_objects() if isinstance(kept, held)}
    alive = []

    def observing(self, *arguments):
        objects = [kept for kept in gc.get_objects() if isinstance(kept, held) and id(kept) not in before]
        alive.extend(type(kept).__name__ for kept in objects if kept is not self)
        return observe(self, *arguments)

    monkeypatch.setattr(CurveCallback, "observe", observing)
    measure(specs()[0])
    assert alive == []


def test_documents_make_up_the_test_loss(measured):
    loss = values(measured, metric="eval_loss", split="test")["raw", 6]
    rows = [e for e in measured.examples if e.arm == "raw"]
    assert sum(e.value * e.tokens for e in rows) / sum(e.tokens for e in rows) == pytest.approx(loss, rel=1e-12)
    assert sum(e.tokens for e in rows) == 4 * 31


def test_memory_is_measured(measured):
    extra, averaged = (values(measured, metric=m)[None, 6] for m in ("ema_extra_bytes", "averaged_param_bytes"))
    assert averaged == 4 * 117_120
    assert extra == pytest.approx(averaged, rel=0.01)
    assert measured.memory_bytes["ema"] == 4 * averaged


def test_a_recommended_decay_that_is_in_the_list_is_followed_once(measure):
    measurements = measure(specs(decays=(compute_optimal_decay(6), 0.999))[0])
    loss = values(measurements, metric="eval_loss", split="test")
    assert loss["ema_optimal", 6] == loss[f"ema_{compute_optimal_decay(6):g}", 6]


def test_an_average_that_is_never_updated_fails_the_trial(inline_cli, small, monkeypatch, tmp_path, read_all):
    monkeypatch.setattr(EMAModel, "update", lambda self: None)
    assert inline_cli(*small) == 4
    for record in read_all(tmp_path / "results").values():
        assert record["status"] == "crashed"
        assert "manipulation check failed: ema_updates" in record["error"]
        assert record["observations"], "what was measured is kept"


def test_an_average_that_copies_the_weights_fails_the_trial(inline_cli, small, monkeypatch, tmp_path, read_all):
    update, build, parameters = EMAModel.update, EMAModel.__init__, {}

    def building(self, model, *arguments, **options):
        build(self, model, *arguments, **options)
        parameters[id(self)] = dict(model.named_parameters())

    def copying(self):
        update(self)
        state = self.state_dict()
        for averages in state["averages"].values():
            averages.update({name: parameters[id(self)][name].detach().clone() for name in averages})
        self.load_state_dict(state)

    monkeypatch.setattr(EMAModel, "__init__", building)
    monkeypatch.setattr(EMAModel, "update", copying)
    assert inline_cli(*small) == 4
    errors = {record["error"] for record in read_all(tmp_path / "results").values()}
    assert all("averages_equal_to_raw" in error for error in errors)


def test_weights_that_do_not_train_fail_the_trial(inline_cli, small, monkeypatch, tmp_path, read_all):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    assert inline_cli(*small) == 4
    errors = {record["error"] for record in read_all(tmp_path / "results").values()}
    assert all("training_moved_the_model" in error for error in errors)


def test_a_loss_that_is_not_a_number_is_a_divergence_on_record(inline_cli, small, tmp_path, read_all, capsys):
    assert inline_cli(*small, "--learning-rate", "1e30", "--length.learning-rate", "1e30") == 4
    records = read_all(tmp_path / "results")
    assert {record["status"] for record in records.values()} == {"diverged"}
    assert all("loss of arm" in record["error"] for record in records.values())
    assert "0 of 2 planned trials succeeded (2 diverged)" in capsys.readouterr().out
