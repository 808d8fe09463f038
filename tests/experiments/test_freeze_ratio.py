"""The design of ``freeze_ratio``: its arms, what proves that they were frozen, its plan, wrong input."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from experiments.freeze_ratio import EXPERIMENT, METHODS, SCALES, Settings, trials
from experiments.harness.experiment import UserError
from experiments.harness.freezing import (
    EMBEDDINGS_TRAINED,
    HALF,
    NONE,
    UPPER_HALF,
    arms_of,
    embeddings_frozen,
    freeze,
    frozen,
    frozen_layers,
    share_level,
)
from forge.presets import get_preset

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
SHARES = (0, 25, 50, 75, 90)


def model_of(task: str, method: str, layers: int = 6) -> torch.nn.Module:
    if task == "language_modelling":
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, **SIZES))
    else:
        model = BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **SIZES))
    return get_preset("lora").prepare(model) if method == "lora" else model


def trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("task", ["language_modelling", "classification"])
@pytest.mark.parametrize("method", METHODS)
def test_every_arm_freezes_what_its_checks_expect(task, method):
    for arm in arms_of(method, SHARES):
        model = model_of(task, method)
        before = {name for name, p in model.named_parameters() if p.requires_grad}
        report = freeze(model, arm)
        left = {name for name, p in model.named_parameters() if p.requires_grad}
        assert report.trainable_params == trainable(model)
        assert set(report.parameters) == before - left
        expected, observed = frozen_layers(model, arm)
        assert expected == observed
        embeddings = embeddings_frozen(model, arm, method)
        assert embeddings[0] == embeddings[1]


@pytest.mark.parametrize("arm", ["lower_25", HALF, UPPER_HALF])
def test_the_checks_notice_an_arm_that_was_not_frozen(arm):
    expected, observed = frozen_layers(model_of("language_modelling", "full"), arm)
    assert expected and observed == []
    assert embeddings_frozen(model_of("language_modelling", "full"), arm, "full") == (True, False)


@pytest.mark.parametrize("task", ["language_modelling", "classification"])
@pytest.mark.parametrize("method", METHODS)
def test_upper_and_lower_half_leave_as_much_to_train(task, method):
    halves = []
    for arm in (HALF, UPPER_HALF):
        model = model_of(task, method)
        freeze(model, arm)
        halves.append(trainable(model))
    assert halves[0] == halves[1]


@pytest.mark.parametrize("arm", arms_of("full", SHARES))
def test_thawed_as_before(arm):
    model = model_of("classification", "full")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with frozen(model, arm):
        assert (trainable(model) < sum(p.numel() for p in model.parameters())) == (arm != NONE)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_levels_of_arms_frozen_from_below():
    model = model_of("language_modelling", "full", layers=30)
    levels = [share_level(model, arm) for arm in arms_of("full", SHARES)]
    key = "layers_per_trained_layer"
    assert levels == [{key: 1}, {key: 30 / 23}, {key: 2}, {key: 30 / 8}, {key: 10}, {}, {}]


def test_plan_pairs_arms_and_counts():
    plan = trials(SCALES["cpu"], "cpu")
    quality = [spec for spec in plan if spec.factors["measure"] == "quality"]
    cost = [spec for spec in plan if spec.factors["measure"] == "cost"]
    assert len(quality) == (5 + 8) * (7 + 6)
    assert len(cost) == 5 * 2 * 2
    assert len({spec.trial_id for spec in plan}) == len(plan)
    arms = {spec.factors["frozen"] for spec in quality if spec.factors["method"] == "lora"}
    assert EMBEDDINGS_TRAINED not in arms


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"shares": (0, 25)}, "shares must differ and hold 0 and 50, got 0 25"),
        ({"shares": (0, 50, 50)}, "shares must differ and hold 0 and 50"),
        ({"shares": (0, 50, 100)}, r"shares must be percent in \[0, 100\), got 100"),
        ({"timed_rounds": 0}, "timed_rounds must be at least 1, got 0"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SCALES["cpu"], **changes)


def test_wrong_learning_rate_of_lora():
    run = dataclasses.replace(SCALES["cpu"].classification, lora_learning_rate=0.0)
    with pytest.raises(UserError, match=r"lora_learning_rate must be positive, got 0\.0"):
        dataclasses.replace(SCALES["cpu"], classification=run)


def test_claims_use_arms_and_metrics_of_the_design():
    arms = {arm for method in METHODS for arm in arms_of(method, SHARES)}
    for claim in EXPERIMENT.claims:
        named = {value for value in str(dataclasses.asdict(claim.estimand)).split("'") if "lower_" in value}
        assert named <= arms, claim.id


def test_a_statement_of_at_least_says_what_its_region_says():
    said = {}
    for claim in EXPERIMENT.claims:
        if words := re.search(r"не менее (\d+) %(.*)", claim.statement):
            said[claim.id] = int(words[1]) / 100
            assert (claim.region.low, claim.region.high) == (pytest.approx(said[claim.id]), math.inf), claim.id
            assert "±" not in words[2], claim.id
    assert len(said) == 6 and said["freeze-25-saves-peak-memory-language-modelling"] == 0.2


def test_settings_hold_every_option_of_a_spec():
    spec = trials(SCALES["smoke"], "smoke")[0]
    assert set(spec.settings) <= {f.name for f in dataclasses.fields(Settings)} | {"paired_seeds"}
