"""The design of ``lora_scaling``: its arms, equal parameters, what proves an arm, tuning, the usable band, its plan."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, set_seed

from analysis.estimands import per_seed_values
from experiments.harness.claims import Interaction
from experiments.harness.experiment import Preempted, UserError
from experiments.harness.lora import (
    LoraArm,
    adapter_params,
    add_lora,
    lora_facts,
    rank_at_equal_parameters,
    target_names,
)
from experiments.harness.rate_curve import (
    Arm,
    RateRun,
    begin,
    enclose,
    frozen_weights_that_moved,
    loss_without_skill,
    metrics_of,
    observe_curve,
    schedule_facts,
    train_at,
    usable_band,
)
from experiments.harness.record import EVAL_LOSS, Measurements
from experiments.harness.training import TrainingPlan, train
from experiments.lora_scaling import (
    CENTRE,
    EXPERIMENT,
    METHODS,
    SCALES,
    LanguageModelling,
    Sentiment,
    arms_of,
    first_rate,
    run_trial,
    trials,
)
from tests.experiments.stopping import Context

CPU = SCALES["cpu"]
TINY = SCALES["smoke"].classification


def bert(hidden: int = 64, intermediate: int = 256) -> BertForSequenceClassification:
    """MiniLM-L6 has these proportions: the feed-forward part is four times as wide."""
    set_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_hidden_layers=2, **sizes))


def llama() -> LlamaForCausalLM:
    """The proportions of SmolLM2-135M, with its grouped keys and values."""
    set_seed(0)
    sizes = {"hidden_size": 72, "intermediate_size": 192, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, tie_word_embeddings=True, **sizes))


@pytest.mark.parametrize(
    ("model", "leaves"),
    [
        (
            bert(),
            {
                "qv": {"attention.self.query", "attention.self.value"},
                "qkvo": {
                    "attention.self.query",
                    "attention.self.key",
                    "attention.self.value",
                    "attention.output.dense",
                },
                "mlp": {"intermediate.dense", "output.dense"},
            },
        ),
        (
            llama(),
            {
                "qv": {"self_attn.q_proj", "self_attn.v_proj"},
                "qkvo": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
                "mlp": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
            },
        ),
    ],
)
def test_target_names_are_those_of_the_layers(model, leaves):
    stack = "bert.encoder.layer" if hasattr(model, "bert") else "model.layers"
    for targets, expected in leaves.items():
        assert set(target_names(model, targets)) == {f"{stack}.{i}.{leaf}" for i in range(2) for leaf in expected}
    assert set(target_names(model, "all")) == {*target_names(model, "qkvo"), *target_names(model, "mlp")}


def test_ranks_at_equal_parameters_by_hand():
    """MiniLM-L6: qkvo costs 4·768 a layer and rank, qv 2·768, mlp 2·1920, all both."""
    model = bert(384, 1536)
    ranks = {
        targets: rank_at_equal_parameters(model, LoraArm(targets=targets)) for targets in ("qv", "qkvo", "mlp", "all")
    }
    assert ranks == {"qv": 32, "qkvo": 16, "mlp": 13, "all": 7}
    assert rank_at_equal_parameters(model, LoraArm(rank=2)) == 2


@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.parametrize("arm", arms_of("lora", CPU, CPU.classification).values(), ids=str)
def test_adapters_are_as_the_arm_says(build, arm):
    plain = build()
    adapted = add_lora(copy.deepcopy(plain), arm.lora, seed=0)
    checks = lora_facts(plain, adapted, arm.lora, with_head=build is bert)
    due_to_rounding = {"lora_params_within_5_percent_of_qkvo"} if arm.lora.targets in ("mlp", "all") else set()
    assert {name for name, (due, found) in checks.items() if due != found} <= due_to_rounding
    assert checks["lora_params"][1] == adapter_params(adapted) > 0


@pytest.mark.parametrize(
    ("claimed", "wrong"),
    [
        (LoraArm(rank=8), {"lora_ranks", "lora_params", "lora_params_within_5_percent_of_qkvo"}),
        (LoraArm(alpha_ratio=4), {"lora_scalings"}),
        (LoraArm(targets="qv"), {"lora_modules", "lora_ranks"}),
    ],
)
def test_the_facts_notice_another_arm(claimed, wrong):
    plain = bert()
    adapted = add_lora(copy.deepcopy(plain), LoraArm(), seed=0)
    checks = lora_facts(plain, adapted, claimed, with_head=True)
    assert {name for name, (due, found) in checks.items() if due != found} == wrong


def test_the_facts_notice_parameters_that_are_not_equal():
    """One wide map of a narrow model: no whole rank comes within 5 %."""
    plain = bert(8, 400)
    adapted = add_lora(copy.deepcopy(plain), LoraArm(targets="mlp", rank=2), seed=0)
    checks = lora_facts(plain, adapted, LoraArm(targets="mlp", rank=2), with_head=True)
    assert checks["lora_params_within_5_percent_of_qkvo"] == (True, False)


def test_adapters_and_head_depend_on_the_seed_alone():
    ours, again = (begin(Measurements(), TINY, Arm(LoraArm(), 4), seed=3).model for _ in range(2))
    wider = begin(Measurements(), TINY, Arm(LoraArm(rank=64), 4), seed=3).model
    other = begin(Measurements(), TINY, Arm(LoraArm(), 4), seed=4).model
    weights = dict(ours.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())
    head = [name for name in weights if "classifier" in name]
    assert head and all(torch.equal(weights[name], dict(wider.named_parameters())[name]) for name in head)
    assert any(not torch.equal(weights[name], dict(other.named_parameters())[name]) for name in head)


def test_schedules_end_and_bend_as_they_should(tmp_path):
    context = SimpleNamespace(
        work_dir=tmp_path, report=lambda *_, **__: None, should_stop=lambda: False, wandb_run_id=lambda: None
    )
    for schedule, warmup in (("constant", 0.1), ("linear", 0.1), ("cosine", 0.1), ("cosine", 0.0)):
        arm = Arm(None, 4, schedule, warmup)
        ingredients = begin(Measurements(), TINY, arm, seed=0)
        plan = TrainingPlan(10, 1, 1e-3, schedule, warmup, 0.0, "fp32", 0)
        data = ingredients.train, ingredients.validation
        scheduler = train(ingredients.model, *data, plan, context, collator=ingredients.collator).trainer.lr_scheduler
        due, found = schedule_facts(arm, 1e-3, 10, scheduler)
        assert due == found
        for other in {"constant", "linear", "cosine"} - {schedule}:
            due, found = schedule_facts(dataclasses.replace(arm, schedule=other), 1e-3, 10, scheduler)
            assert due != found


def test_the_linear_schedule_by_hand(tmp_path):
    """Ten steps, one of warm-up: 0, 1, 8/9, 7/9, … of the peak."""
    arm = Arm(None, 1, "linear", 0.1)
    run = dataclasses.replace(TINY, warmup_ratio=0.1, batch_size=1)
    ingredients = begin(Measurements(), run, arm, seed=0)
    plan = run.plan(0, 10, "linear")
    context = SimpleNamespace(
        work_dir=tmp_path, report=lambda *_, **__: None, should_stop=lambda: False, wandb_run_id=lambda: None
    )
    outcome = train(
        ingredients.model, ingredients.train, ingredients.validation, plan, context, collator=ingredients.collator
    )
    share = outcome.trainer.lr_scheduler.lr_lambdas[0]
    assert [share(step) for step in range(11)] == pytest.approx([0, *((10 - step) / 9 for step in range(1, 11))])


def test_runs_begin_at_the_same_weights_and_leave_them(tmp_path):
    """The second run at a rate gives the same scores to the last bit as one that is the first."""
    arm = Arm(LoraArm(rank=2), 4)
    ingredients = begin(Measurements(), TINY, arm, seed=0)
    before = copy.deepcopy(ingredients.model)
    first, other, again = (
        train_at(rate, TINY, arm, 2, ingredients, 0, tmp_path / str(i)) for i, rate in enumerate((1e-2, 1e-1, 1e-2))
    )
    assert first.scores == again.scores != other.scores
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), ingredients.model.parameters(), strict=True))
    assert all(due == found for run in (first, other, again) for due, found in run.checks.values())
    assert first.checks["examples"] == (8, 8)


def test_a_frozen_weight_that_moved_is_named():
    before = add_lora(bert(), LoraArm(), seed=0)
    after = copy.deepcopy(before)
    assert frozen_weights_that_moved(before, after) == []
    name, weight = next((n, p) for n, p in after.named_parameters() if not p.requires_grad)
    with torch.no_grad():
        weight += 1
    assert frozen_weights_that_moved(before, after) == [name]


def test_loss_without_skill_is_the_entropy_of_the_labels():
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    classes = SimpleNamespace(test=SimpleNamespace(labels=np.array([0, 0, 0, 1])))
    assert loss_without_skill(Sentiment(), classes) == pytest.approx(expected)
    text = SimpleNamespace(
        test=SimpleNamespace(input_ids=np.array([[7, 5, 5], [6, 5, 6]]))
    )  # the first is not predicted
    assert loss_without_skill(LanguageModelling(), text) == pytest.approx(expected)


def test_a_language_model_is_an_arm_too(tmp_path):
    """Nothing but adapters trains, and the scores are losses."""
    run = LanguageModelling(
        model="tiny-random", random_init=True, sequence_length=16, precision="fp32", validation_blocks=2, test_blocks=2
    )
    arm, into = Arm(LoraArm(rank=2, targets="all"), 2), measurements()
    ingredients = begin(into, run, arm, seed=0)
    trained = train_at(1e-3, run, arm, 1, ingredients, 0, tmp_path)
    assert metrics_of(run) == (EVAL_LOSS,)
    assert trained.scores["test"] == [pytest.approx(math.log(257), rel=0.05)]
    rates = [1e-4, 1e-3, 1e-2]
    runs = [dataclasses.replace(trained, learning_rate=rate) for rate in rates]
    runs[1] = dataclasses.replace(runs[1], scores={split: [1.0] for split in trained.scores})
    observe_curve(into, run, arm, 1, runs, rates, (), loss_without_skill(run, ingredients))
    wrong = {check.name for check in into.checks if not check.passed}
    assert wrong <= {"lora_params_within_5_percent_of_qkvo"}  # rank 2 leaves no choice
    assert [o.value for o in into.observations if o.metric == "tuned_loss"] == [1.0]
    assert "tuned_accuracy" not in {o.metric for o in into.observations}


@pytest.mark.parametrize(
    ("losses", "band"),
    [
        ([2.0, 1.0, 1.0, 2.0], (10**0.95, 100 * 10**0.05)),  # 5 % above 1 is a twentieth of the way to 2
        ([1.0, 1.04, 2.0, 1.0], (1.0, 10 * 10 ** (0.01 / 0.96))),  # not resumed beyond a bad rate; ends with the grid
        ([3.0, 2.0, 1.5, 1.0], (1e3 * 10**-0.1, 1e3)),
    ],
)
def test_usable_band_by_hand(losses, band):
    assert usable_band([1.0, 10.0, 100.0, 1000.0], losses, within=0.05) == pytest.approx(band)


def measurements() -> Measurements:
    return Measurements(seconds={"training": 0.0, "evaluation": 0.0})


def runs_of(validation: list[float], test: list[float], rates=(1e-4, 1e-3, 1e-2, 1e-1)) -> list[RateRun]:
    pairs = zip(rates, validation, test, strict=False)
    return [RateRun(r, {"validation": [v, 1 - v], "test": [t, 1 - t]}, {"fact": (1, 1)}, 2.0, 0.5) for r, v, t in pairs]


def observed(runs, tried, long_grid=(), no_skill=0.7):
    into = measurements()
    observe_curve(into, CPU.classification, Arm(None, 8), 7, runs, tried, long_grid, no_skill)
    return into, {o.metric: o for o in into.observations}


def test_validation_chooses_and_test_reports():
    """Among those that the search tried alone, although a rate of the long grid is better; and never by test."""
    runs = runs_of(validation=[0.5, 0.4, 0.45, 0.1], test=[0.3, 0.6, 0.2, 0.2])
    into, found = observed(runs, tried=[1e-4, 1e-3, 1e-2], long_grid=[1e-4, 1e-1], no_skill=0.6)
    assert (found["tuned_loss"].value, found["tuned_accuracy"].value) == (0.6, 0.4)
    assert (found["chosen_learning_rate"].value, found["chosen_at_edge"].value) == (1e-3, 0)
    assert [o.value for o in into.observations if o.metric == "no_gain"] == [0, 1, 0, 0]
    grids = [o.grid for o in into.observations if o.metric == "no_gain"]
    assert grids == ["long", "search", "search", "long"]
    assert found["highest_usable_learning_rate"].value == 1e-1
    assert {o.step for o in into.observations} == {7}
    assert into.seconds == {"training": 8.0, "evaluation": 2.0}
    assert {check.name for check in into.checks} == {f"fact at {rate}" for rate in ("0.0001", "0.001", "0.01", "0.1")}


@pytest.mark.parametrize("losses", [[0.1, 0.4, 0.5], [0.5, 0.4, 0.1]])
def test_a_best_rate_at_an_end_is_no_tuned_outcome(losses):
    _, found = observed(runs_of(losses, losses), tried=[1e-4, 1e-3, 1e-2])
    assert found["chosen_at_edge"].value == 1
    assert "tuned_loss" not in found and "tuned_accuracy" not in found


def test_a_rate_at_which_training_breaks_is_an_outcome_and_not_the_end():
    runs = runs_of([0.5, 0.4, math.nan], [0.5, 0.4, math.nan])
    into, found = observed(runs, tried=[1e-4, 1e-3, 1e-2], long_grid=[1e-4, 1e-3, 1e-2])
    assert into.diverged is None
    assert found["tuned_loss"].value == 0.4
    assert [o.value for o in into.observations if o.metric == "no_gain"] == [0, 0, 1]
    assert found["highest_usable_learning_rate"].value == 1e-3
    assert all(math.isfinite(o.value) for o in into.observations)
    into, found = observed(runs_of([math.nan] * 3, [0.1] * 3), tried=[1e-4, 1e-3, 1e-2])
    assert into.diverged == "the loss is not finite at any learning rate from 0.0001 to 0.01"


@pytest.mark.parametrize("best", [1e-6, 3.2e-5, 1e-3, 3e-2])
def test_a_search_goes_on_until_the_best_rate_is_enclosed(best):
    asked = []

    def loss_at(rate):
        asked.append(rate)
        return abs(math.log10(rate / best))

    tried = enclose(loss_at, 1e-3, 10**0.25, most=30)
    assert tried == sorted(asked) and len(set(asked)) == len(asked)
    nearest = min(tried, key=lambda rate: abs(math.log10(rate / best)))
    assert tried[0] < nearest < tried[-1]
    assert abs(math.log10(nearest / best)) <= 0.13
    steps = np.diff(np.log10(tried))
    assert steps == pytest.approx(0.25, abs=0.03)
    assert enclose(loss_at, 1e-3, 10**0.25, most=3) == [5.6e-4, 1e-3, 1.8e-3]


def test_neighbours_in_the_finest_search_differ():
    tried = enclose(lambda rate: -rate, 1e-3, 1.2, most=20)
    assert len(set(tried)) == 20


def test_a_search_goes_down_where_training_breaks():
    tried = enclose(lambda rate: abs(math.log10(rate / 1e-5)) if rate < 1e-4 else math.inf, 1e-3, 10.0, most=9)
    assert tried == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]


def test_an_arm_is_tuned_around_its_own_rate():
    run = CPU.classification
    lora, full = (arms_of(method, CPU, run) for method in ("lora", "full"))
    assert first_rate("lora", lora["rank_1"], run) == run.lora_learning_rate
    assert first_rate("full", full["batch_128"], run) == pytest.approx(4 * run.learning_rate)
    for arms in (lora, full):
        assert [name for name, arm in arms.items() if arm.long_grid] == [
            name for name in (CENTRE, "no_warmup") if name in arms
        ]


def test_every_arm_changes_one_thing():
    for method in METHODS:
        arms = arms_of(method, CPU, CPU.classification)
        centre = arms.pop(CENTRE)
        for name, arm in arms.items():
            changed = {key for key, value in arm.conditions.items() if value != centre.conditions[key]}
            assert len(changed) == 1, name


def test_the_plan():
    plan = trials(CPU, "cpu")
    assert len(plan) == len({spec.trial_id for spec in plan}) == 5 * (11 + 6)
    assert {spec.factors["track"] for spec in trials(SCALES["gpu"], "gpu")} == {"classification", "language_modelling"}


def test_a_trial_that_was_stopped_goes_on_with_the_next_rate(tmp_path):
    spec = next(s for s in trials(SCALES["smoke"], "smoke") if s.factors["variant"] == "rank_1")
    (tmp_path / "whole").mkdir()
    whole = run_trial(spec, Context(tmp_path / "whole"))
    context = Context(tmp_path, stop_at=3)
    with pytest.raises(Preempted):
        run_trial(spec, context)
    again = Context(tmp_path)
    assert run_trial(spec, again).observations == whole.observations
    rates = sum(o.metric == "no_gain" for o in whole.observations)
    assert again.asked == rates - 2


def recorded(scale: str) -> pd.DataFrame:
    """What the trials of a scale would record, were the loss a parabola in the learning rate with noise on top."""
    draw, settings = np.random.default_rng(0), SCALES[scale]
    rows = []
    for spec in trials(settings, scale):
        track, method, variant = spec.factors.values()
        run = getattr(settings, track)
        arm = arms_of(method, settings, run)[variant]
        best, runs = {"full": -4.0, "lora": -3.0}[method], {}

        def train(rate: float, best=best, runs=runs, run=run) -> float:
            loss = 0.4 + 0.1 * (math.log10(rate) - best) ** 2
            splits = ("validation", "test")
            scores = {split: [loss + 0.001 * draw.random() for _ in metrics_of(run)] for split in splits}
            runs.setdefault(rate, RateRun(rate, scores, {}, 0.0, 0.0))
            return runs[rate].loss("validation")

        tried = enclose(train, first_rate(method, arm, run), settings.rate_factor, settings.most_rates)
        long_grid = settings.learning_rates if arm.long_grid else ()
        for rate in long_grid:
            train(rate)
        into = measurements()
        rising = [runs[rate] for rate in sorted(runs)]
        observe_curve(into, run, arm, run.examples // arm.batch_size, rising, tried, long_grid, no_skill=0.6)
        trial = {"trial_id": spec.trial_id, "seed": spec.seed, "status": "ok", **spec.factors}
        rows += [trial | observation.model_dump() for observation in into.observations]
    return pd.DataFrame(rows)


def test_every_claim_can_be_estimated_from_what_is_recorded():
    """On both tracks at gpu; at cpu all but those on language modelling."""
    gpu, cpu = recorded("gpu"), recorded("cpu")
    for claim in EXPERIMENT.claims:
        assert per_seed_values(claim.estimand, gpu).size == SCALES["gpu"].seeds, claim.id
        if "language_modelling" not in str(claim.estimand):
            assert per_seed_values(claim.estimand, cpu).size == CPU.seeds, claim.id
    shift = next(claim for claim in EXPERIMENT.claims if claim.id == "lora-best-rate-above-sft-classification")
    assert per_seed_values(shift.estimand, gpu).mean() == pytest.approx(1.0, abs=0.1)


def test_claims_name_arms_and_rates_of_the_design():
    arms = {name for method in METHODS for name in arms_of(method, CPU, CPU.classification)}
    for claim in EXPERIMENT.claims:
        estimand = claim.estimand.estimand if isinstance(claim.estimand, Interaction) else claim.estimand
        words = str(dataclasses.asdict(estimand))
        named = {part.split("'")[0] for part in words.split("'variant': '")[1:]}
        rates = {float(part.split("}")[0].split(",")[0]) for part in words.split("'learning_rate': ")[1:]}
        assert named <= arms, claim.id
        assert rates <= set(CPU.learning_rates) & set(SCALES["gpu"].learning_rates), claim.id
        assert claim.id.startswith("lora-") and claim.section in ("presets", "lecture", "classic")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"ranks": (1, 16)}, "ranks must not hold the centre's 16"),
        ({"ranks": (1, 1)}, "ranks must be positive and differ, got 1 1"),
        ({"learning_rates": (0.0, 1e-3)}, r"learning_rates must be positive and differ, got 0\.0 0\.001"),
        ({"learning_rates": (1e-3,)}, "learning_rates must be at least 2, got 1"),
        ({"rate_factor": 1.1}, r"rate_factor must be at least 1\.2, got 1\.1"),
        ({"most_rates": 2}, "most_rates must be at least 3 .*, got 2"),
        ({"batch_sizes": (8,)}, "batch_sizes must not hold the centre's 8"),
        ({"batch_sizes": (5,)}, "examples must be a multiple of every batch size, got 768 and 5"),
        ({"classification": Sentiment(lora_learning_rate=0.0)}, r"lora_learning_rate must be positive, got 0\.0"),
        ({"classification": Sentiment(method="lora")}, "method must be full"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CPU, **changes)


def test_more_examples_than_there_are(tmp_path):
    run = dataclasses.replace(TINY, examples=24)
    settings = dataclasses.replace(SCALES["smoke"], classification=run)
    context = SimpleNamespace(work_dir=tmp_path)
    with pytest.raises(UserError, match=r"examples must be at most 16 \(one pass over movie_sentiment\), got 24"):
        run_trial(trials(settings, "smoke")[0], context)
