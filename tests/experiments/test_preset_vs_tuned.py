"""The design of ``preset_vs_tuned``: its spaces, pairs and proofs, that a trial resumes, its plan, wrong input."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding

from analysis.estimands import per_seed_values
from experiments.harness import classification, swept
from experiments.harness.classification import CLASSIFIER_LOSS
from experiments.harness.data import Examples
from experiments.harness.experiment import Preempted, UserError
from experiments.harness.models import load_tokenizer
from experiments.harness.record import Measurements
from experiments.harness.sweep import Rates, SweepRun
from experiments.harness.swept import DEFAULTS, RATE_AND_NEXT, TUNED, measure_swept, prepared, space_of
from experiments.harness.tuned import Subject
from experiments.preset_vs_tuned import CLAIMS, LM, LOOKS, PRESETS, SCALES, SENTIMENT, Sentiment, trials
from forge.presets import get_preset
from tests.experiments.stopping import Context

BERT = BertConfig(
    vocab_size=258, type_vocab_size=1, pad_token_id=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4,
)  # fmt: skip
RATES = Rates(1e-5, 3e-2)
STEPS = {"steps": 6.0, "planned_steps": 6.0}


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory):
    """``subject_of(preset)``: on a few random examples, with a small pretrained model from a folder."""
    torch.manual_seed(0)
    model, folder, draw = (
        BertForSequenceClassification(BERT),
        tmp_path_factory.mktemp("model"),
        np.random.default_rng(0),
    )
    model.bert.save_pretrained(folder)
    load_tokenizer("tiny-random-encoder").save_pretrained(folder)
    run = Sentiment(model=str(folder), dataset="unused", sequence_length=16)

    def examples(count):
        ids = tuple([257, *draw.integers(0, 256, draw.integers(3, 12)).tolist()] for _ in range(count))
        return Examples(ids, np.arange(count) % 2, tuple(f"d{i}" for i in range(count)))

    collator = DataCollatorWithPadding(load_tokenizer("tiny-random-encoder"))
    data = classification.Ingredients(model, examples(16), examples(6), examples(10), ("bad", "good"), collator, {})
    return lambda preset: Subject(preset, run, data)


def measured(subject, space, place, stop_at=0):
    into = Measurements(seconds={"training": 0.0, "evaluation": 0.0})
    place.mkdir(exist_ok=True)
    measure_swept(into, subject, space, 0, Context(place, stop_at))
    return into


@pytest.mark.parametrize("name", PRESETS)
def test_the_study_begins_with_the_presets_own_recipe(name):
    space, preset = space_of(name, RATES, 12, LOOKS), get_preset(name)
    assert get_preset(name, **space.start) == preset
    lora = {"lora_r", "lora_alpha", "lora_dropout", "target_modules"}
    recipe = {"learning_rate", "warmup_steps", "lr_scheduler_type", "weight_decay"}
    assert space.options.keys() == recipe | (set() if name in ("sft", "classic") else lora)
    for option, levels in space.options.items():
        for level in levels if isinstance(levels, tuple) else (levels.low, levels.high):
            get_preset(name, **{option: level})


def test_a_rate_of_a_preset_out_of_bounds_is_wrong_input():
    with pytest.raises(UserError, match=r"start inside its space, got learning_rate=2e-05; .*low=0\.0001"):
        space_of("sft", Rates(1e-4, 1e-2), 12, LOOKS)


@pytest.mark.parametrize("name", PRESETS)
def test_arms_of_a_seed_share_the_head_and_train_what_is_chosen(subject_of, tmp_path, name):
    chosen = {"learning_rate": 1e-3, "warmup_steps": 0.0, "lr_scheduler_type": "linear"}
    if name not in ("sft", "classic"):
        chosen |= {"lora_r": 4, "lora_alpha": 64, "target_modules": "all-linear"}
    heads = []
    for values in ({}, chosen):
        ready, preset, arguments = prepared(subject_of(name), values, 5, tmp_path)
        (head,) = (
            p
            for n, p in ready.ingredients.model.named_parameters()
            if p.requires_grad and "classifier" in n and n.endswith("weight")
        )
        heads.append(head.detach().clone())
        assert preset == get_preset(name, **values)
        assert (arguments.seed, arguments.data_seed) == (5, 5)
        assert ready.run.precision == ("bf16" if arguments.bf16 else "fp32")
        assert (arguments.learning_rate, arguments.warmup_steps) == (preset.learning_rate, preset.warmup_steps)
        assert arguments.max_grad_norm == preset.max_grad_norm
        assert arguments.gradient_accumulation_steps == preset.gradient_accumulation_steps
    assert torch.equal(*heads)


@pytest.mark.parametrize("name", ["sft", "qlora"])
def test_a_preset_is_swept_and_judged(subject_of, tmp_path, name):
    """Stopped after the second run of its study, and before its last run; ends as one that was not stopped."""
    subject, space = subject_of(name), space_of(name, RATES, 4, LOOKS)
    whole = measured(subject, space, tmp_path / "whole")
    for stop_at in (3, 3 + 1):
        with pytest.raises(Preempted):
            measured(subject, space, tmp_path / "parts", stop_at)
    assert len(json.loads((tmp_path / "parts" / "study.json").read_text())) == 4
    parts = measured(subject, space, tmp_path / "parts")
    assert parts.observations == whole.observations and parts.examples == whole.examples
    assert whole.checks == parts.checks and all(check.passed for check in whole.checks) and whole.diverged is None
    names = {check.name for check in whole.checks}
    assert {"first_run", "whole_runs", "defaults options", "tuned options", "tuned trainable_params"} <= names
    rows = [o.model_dump() for o in whole.observations]
    test = {o["arm"]: o["value"] for o in rows if o.get("split") == "test" and o["metric"] == "eval_loss"}
    assert test.keys() == {DEFAULTS, TUNED}
    study = [o for o in rows if o["arm"] == "study" and o["metric"] == "eval_loss"]
    assert [o["run"] for o in study] == [0, 1, 2, 3]
    (chosen,) = (o for o in study if o["chosen"])
    rates = {o["arm"]: o["value"] for o in rows if o["metric"] == "chosen_learning_rate"}
    assert rates == {DEFAULTS: get_preset(name).learning_rate, TUNED: chosen["learning_rate"]}
    far = {o["rate"]: o["value"] for o in rows if o["metric"] == "learning_rate_distance"}
    ratio = rates[TUNED] / rates[DEFAULTS]
    assert far == {"chosen": abs(math.log10(ratio)), "threefold": pytest.approx(math.log10(3))}
    shares = {o["option"]: o["value"] for o in rows if o["metric"] == "importance"}
    both = shares.pop(RATE_AND_NEXT)
    assert shares.keys() == space.options.keys() and sum(shares.values()) == pytest.approx(1)
    others = [share for option, share in shares.items() if option != "learning_rate"]
    assert both == pytest.approx(shares["learning_rate"] + max(others))


@pytest.mark.parametrize(("factor", "inside"), [(1.5, True), (1 / 1.5, True), (9, False), (1 / 9, False)])
def test_a_rate_is_standard_within_a_factor_on_both_sides(factor, inside):
    own, claim = get_preset("sft").learning_rate, next(c for c in CLAIMS if c.id == "preset-sft-rate-is-standard")
    space = space_of("sft", Rates(SCALES["cpu"].lowest_rate, SCALES["cpu"].highest_rate), 3, LOOKS)
    runs = [SweepRun({**space.start, "learning_rate": own * f}, [1 / f] * 3, False, STEPS) for f in (0.5, 1)]
    best = SweepRun({**space.start, "learning_rate": own * factor}, [0.1] * 3, False, STEPS)
    assert space.options["learning_rate"].low <= own * factor <= space.options["learning_rate"].high
    into = Measurements()
    swept._observe_study(into, CLASSIFIER_LOSS, [*runs, best], best, space)
    rows = pd.DataFrame([{"seed": 0, **claim.estimand.where, **o.model_dump()} for o in into.observations])
    (value,) = per_seed_values(claim.estimand, rows)
    assert value == pytest.approx(abs(math.log(factor, 3)))
    assert (claim.region.low <= value <= claim.region.high) == inside


def test_the_checks_notice_another_recipe(subject_of, tmp_path, monkeypatch):
    """Defaults that are not those of the preset, as a change in how arguments are handed over would make them."""

    def other(subject, values, seed, work_dir):
        return prepared(subject, {**values, "warmup_steps": 0.3}, seed, work_dir)

    monkeypatch.setattr(swept, "prepared", other)
    into = measured(subject_of("sft"), space_of("sft", RATES, 3, LOOKS), tmp_path)
    assert "defaults options" in [check.name for check in into.checks if not check.passed]


def test_plan():
    plan = trials(SCALES["cpu"], "cpu")
    assert len({spec.trial_id for spec in plan}) == len(plan) == 5 * 4
    assert {(s.factors["track"], s.factors["preset"]) for s in plan} == {
        (SENTIMENT, name) for name in ("sft", "classic", "lora", "qlora")
    }
    tasks = {(s.factors["track"], s.factors["preset"]) for s in trials(SCALES["gpu"], "gpu")}
    assert tasks == {(SENTIMENT, name) for name in PRESETS} | {(LM, "sft"), (LM, "lora")}


def test_every_claim_names_presets_and_arms_of_the_plan():
    known = {(s.factors["track"], s.factors["preset"]) for s in trials(SCALES["gpu"], "gpu")}
    for claim in CLAIMS:
        text = json.dumps(dataclasses.asdict(claim.estimand))
        named = {name for name in PRESETS if f'"preset": "{name}"' in text}
        assert named and all((claim.estimand.where["track"], name) in known for name in named), claim.id
        assert claim.section == "presets"
        assert '"option": "learning_rate"' not in text or f'"option": "{RATE_AND_NEXT}"' in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"presets": ("lora", "qlor")}, r"unknown preset 'qlor'; did you mean qlora"),
        ({"presets": ("lora", "lora")}, "presets must be named once each, got lora lora"),
        ({"tuning_runs": 2}, r"tuning_runs must be at least 3 \(the defaults, and two to compare\), got 2"),
        ({"random_init": True}, "qlora quantises pretrained weights, got random ones; leave it out of --presets"),
    ],
)
def test_wrong_runs(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SCALES["cpu"].classification, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1 and below 10000, got 0"),
        ({"lowest_rate": 0.1}, "learning rates must be an interval above 0, got 0.1 to 0.03; lower the first"),
        ({"classification": Sentiment(presets=())}, "presets must be named for one task at least, got none"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SCALES["cpu"], **change)


def test_blocks_to_train_on_are_some():
    with pytest.raises(UserError, match="train_blocks must be at least 1, got 0"):
        dataclasses.replace(SCALES["gpu"].language_modelling, train_blocks=0)
