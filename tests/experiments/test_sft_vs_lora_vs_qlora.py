"""The design of ``sft_vs_lora_vs_qlora``: its methods and what proves them, baselines, its plan, wrong input."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from experiments.harness import causal_lm, classification, tuning
from experiments.harness.baselines import few_shot_loss, nearest_prototype, with_context
from experiments.harness.data import Blocks, Examples
from experiments.harness.experiment import Preempted, UserError
from experiments.harness.methods import (
    METHODS,
    base_linears,
    build,
    callbacks_of,
    checks_after,
    checks_before,
    expected_trainable,
    preset_of,
)
from experiments.harness.models import load_tokenizer
from experiments.harness.record import Measurements
from experiments.harness.tuned import Looks, Subject, measure_tuned
from experiments.sft_vs_lora_vs_qlora import (
    CLAIMS,
    FEW_SHOT,
    LM,
    SCALES,
    SENTIMENT,
    ZERO_SHOT,
    LanguageModelling,
    Sentiment,
    _run,
    run_trial,
    trials,
)
from tests.experiments.stopping import Context

WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(vocab_size=257, num_key_value_heads=2, pad_token_id=256, eos_token_id=256, **WIDTHS)
BERT = BertConfig(vocab_size=258, type_vocab_size=1, pad_token_id=256, **WIDTHS)
TASKS = (LM, SENTIMENT)


def plain_model(task):
    torch.manual_seed(0)
    if task == LM:
        return LlamaForCausalLM(LLAMA)
    return BertForSequenceClassification(BERT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small pretrained models whose rows are whole blocks of 64, as 4-bit weights need on a CPU."""
    places = {}
    for task, model in ((LM, plain_model(LM)), (SENTIMENT, plain_model(SENTIMENT).bert)):
        places[task] = tmp_path_factory.mktemp(task)
        model.save_pretrained(places[task])
        load_tokenizer("tiny-random" if task == LM else "tiny-random-encoder").save_pretrained(places[task])
    return places


@pytest.fixture(scope="module")
def subjects(folders):
    """``subjects[task]``: run and ingredients of a few random tokens, whose model comes from a folder."""
    draw = np.random.default_rng(0)
    lm = LanguageModelling(
        model=str(folders[LM]), dataset="unused", steps=6, tuning_runs=2, batch_size=2, sequence_length=16,
        precision="fp32", other_dataset="state_of_the_union",
    )  # fmt: skip
    sentiment = Sentiment(
        model=str(folders[SENTIMENT]), dataset="unused", steps=6, tuning_runs=2, batch_size=4, sequence_length=16,
        precision="fp32",
    )  # fmt: skip

    def blocks(count):
        names = tuple(f"d{i}" for i in range(count))
        return Blocks(draw.integers(0, 256, (count, 16)), np.repeat(np.arange(count), 16).reshape(count, 16), names)

    def examples(count):
        ids = tuple([257, *draw.integers(0, 256, draw.integers(3, 12)).tolist()] for _ in range(count))
        return Examples(ids, np.arange(count) % 2, tuple(f"d{i}" for i in range(count)))

    parts = {LM: [blocks(n) for n in (8, 3, 5)], SENTIMENT: [examples(n) for n in (16, 6, 10)]}
    collator = DataCollatorWithPadding(load_tokenizer("tiny-random-encoder"))
    return {
        LM: (lm, causal_lm.Ingredients(plain_model(LM), *parts[LM], {})),
        SENTIMENT: (
            sentiment,
            classification.Ingredients(plain_model(SENTIMENT), *parts[SENTIMENT], ("bad", "good"), collator, {}),
        ),
    }


def failed(checks):
    return [check for check in checks if not check.passed]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_what_its_checks_say(subjects, task, name):
    """Closed-form counts, 4-bit modules, the base model's function; at every size."""
    run, ingredients = subjects[task]
    for size in METHODS[name].sizes or (None,):
        preset = preset_of(name, size, run.steps)
        checks = checks_before(run, ingredients, build(run, ingredients, 0, preset), preset)
        assert failed(checks) == []
        assert len(checks) == (2 if METHODS[name].size is None else 3)


@pytest.mark.parametrize("name", ["lora", "houlsby", "prompt-tuning"])
def test_the_checks_notice_what_is_wrong(subjects, name):
    run, ingredients = subjects[SENTIMENT]
    preset = preset_of(name, METHODS[name].middle_size, run.steps)
    model = build(run, ingredients, 0, preset)
    wrong = dataclasses.replace(preset, **{METHODS[name].size: 3})
    assert [c.name for c in failed(checks_before(run, ingredients, model, wrong))] == ["trainable_params"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    expected = ["starts_at_the_base_model"] if METHODS[name].starts_at_base else []
    assert [c.name for c in failed(checks_before(run, ingredients, model, preset))] == expected
    qlora = preset_of("qlora", 16, run.steps)
    assert "nf4_modules" in [c.name for c in failed(checks_before(run, ingredients, model, qlora))]


def test_closed_forms_by_hand():
    """Two layers of width 64 and 128 inside; LLAMA has keys and values of width 32."""
    attention = 2 * (64 + 64) + 2 * (64 + 32)
    by_hand = {
        "lora": 2 * 8 * attention,
        "lora-all-linear": 2 * 8 * (attention + 3 * (64 + 128)),
        "adalora": 2 * (12 * attention + 4 * 12),
        "weightlora": 2 * (8 * attention + 4),
        "houlsby": 2 * 2 * (2 * 16 * 64 + 64 + 16),
        "p-tuning-v2": 5 * 2 * 2 * 32,
        "prefix-tuning": 5 * 32 + 33 * 512 + 513 * 128,
        "prompt-tuning": 5 * 64,
        "p-tuning": 5 * 64 + 65 * 128 + 129 * 128 + 129 * 64,
    }
    base = plain_model(LM)
    for name, expected in by_hand.items():
        assert expected_trainable(base, preset_of(name, METHODS[name].sizes[0], 10)) == expected, name
    assert expected_trainable(base, preset_of("sft", None, 10)) == sum(p.numel() for p in base.parameters())


def test_linear_maps_without_the_head():
    assert len(base_linears(plain_model(LM))) == 2 * 7
    assert len(base_linears(plain_model(SENTIMENT))) == 2 * 6 + 1
    assert len(base_linears(LlamaForSequenceClassification(LLAMA))) == 2 * 7


def test_only_the_stored_weights_of_qlora_differ_from_lora(subjects):
    lora, qlora = (preset_of(name, 8, 6) for name in ("lora", "qlora"))
    for option in ("target_modules", "lora_r", "lora_alpha", "lora_dropout", "gradient_checkpointing", "freeze_ratio"):
        assert getattr(lora, option) == getattr(qlora, option), option
    run, ingredients = subjects[LM]
    drawn = []
    for preset in (lora, qlora):
        model = build(run, ingredients, 0, preset)
        drawn.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    assert drawn[0].keys() == drawn[1].keys()
    for name, weight in drawn[0].items():  # PEFT draws those on 4-bit layers in bf16, their compute dtype
        assert torch.equal(weight.bfloat16(), drawn[1][name].bfloat16()) and drawn[1][name].dtype == torch.float32


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_arms_of_a_seed_share_the_head(subjects):
    run, ingredients = subjects[SENTIMENT]
    heads = set()
    for name in METHODS:
        model = build(run, ingredients, 5, preset_of(name, METHODS[name].middle_size, run.steps))
        trains = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        (head,) = (p for n, p in trains if "classifier" in n and n.endswith("weight"))
        heads.add(tuple(head.flatten().tolist()))
    assert len(heads) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["adalora", "weightlora", "qlora", "prefix-tuning"])
def test_a_method_is_tuned_trained_and_proved(subjects, tmp_path, name):
    """Stopped after its first tuning run and taken up again."""
    run, ingredients = subjects[SENTIMENT]
    space = tuning.Space(1e-4, 1e-2, 1, 2, METHODS[name].sizes)
    into = Measurements(seconds={"training": 0.0, "evaluation": 0.0})
    with pytest.raises(Preempted):
        measure_tuned(into, Subject(name, run, ingredients), space, 0, Context(tmp_path, stop_at=2))
    first = json.loads((tmp_path / "tuning.json").read_text())
    measure_tuned(into, Subject(name, run, ingredients), space, 0, Context(tmp_path))
    assert json.loads((tmp_path / "tuning.json").read_text())[:1] == first
    assert failed(into.checks) == [] and into.diverged is None
    names = {check.name for check in into.checks}
    assert {"tuning_steps", "trainable_params", "frozen_weights_that_moved", "optimizer_steps"} <= names
    assert ("ranks_within_budget" in names, "adapters_kept" in names) == (name == "adalora", name == "weightlora")
    rows = [o.model_dump() for o in into.observations]
    tried = [o for o in rows if o.get("arm") == "tuning" and o["metric"] == "eval_loss"]
    assert [o["tuning_run"] for o in tried] == [0, 1] and all(o["learning_rate"] > 0 for o in tried)
    curve = [o["step"] for o in rows if o.get("arm") == "curve" and o["metric"] == "accuracy"]
    assert curve == [1, 3, 4]
    final = {(o["metric"], o.get("split")): o["value"] for o in rows if o.get("arm") == "final"}
    assert final["saved_bytes", None] > 0
    whole = sum(p.numel() for p in ingredients.model.parameters())
    assert final["trainable_share", None] == final["trainable_params", None] / whole
    assert final["peak_memory_bytes", None] == into.memory_bytes["peak"] > 0
    assert {split for metric, split in final if metric == "eval_loss"} == {"validation", "test"}
    assert final["chosen_learning_rate", None] in [o["learning_rate"] for o in tried]


def test_looking_at_validation_does_not_change_training(subjects, tmp_path):
    weights = []
    for number, looked in enumerate((False, True)):
        subject, _, callbacks = Subject("adalora", *subjects[SENTIMENT]).prepared(tuning.Candidate(1e-2, 8), 0)
        looks = [Looks(subject, 3)] if looked else []
        subject.train(0, tmp_path / str(number), [*callbacks, *looks])
        weights.append([p.detach().clone() for p in subject.ingredients.model.parameters()])
    assert all(map(torch.equal, *weights))
    assert list(looks[0].figures) == [2, 4, 6] and looks[0].evaluation_sec > 0
    assert looks[0].figures[6] == subject.on_validation()[0] != looks[0].figures[4]


def test_weightlora_keeps_half_and_its_check_notices_if_not(subjects):
    run, ingredients = subjects[LM]
    preset = preset_of("weightlora", 8, run.steps)
    model = build(run, ingredients, 0, preset)
    (callback,) = callbacks_of(preset, model, run.steps)
    assert (callback.prune_at_step, callback.top_k) == (2, 4)
    assert failed(checks_after(model, preset, [callback]))[0].observed == "8"


def test_logits_are_those_of_the_text_where_prompts_stand_before_it(subjects):
    run, ingredients = subjects[LM]
    ids = torch.arange(12).view(2, 6)
    for name in ("p-tuning", "prompt-tuning", "p-tuning-v2"):
        model = build(run, ingredients, 0, preset_of(name, 5, run.steps)).eval()
        with torch.no_grad():
            output = model(input_ids=ids, labels=ids)
        assert output.logits.shape == (2, 6, 257)
        expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        # The last learned position predicts the first token of the text too.
        assert output.loss.item() == pytest.approx(expected.item(), rel=0.3)


def test_the_context_of_the_few_shot_prompt_is_not_scored(subjects):
    run, ingredients = subjects[LM]
    longer = with_context(ingredients.test, ingredients.train, 2, 0)
    assert longer.input_ids.shape == (5, 48)
    assert np.array_equal(longer.input_ids[:, 32:], ingredients.test.input_ids)
    assert (longer.input_ids[:, :32] == longer.input_ids[0, :32]).all()
    few = few_shot_loss(run, ingredients, 2, 0)
    zero = causal_lm.losses_on_test(run, ingredients, {"zero": nullcontext})[0]["zero"]
    assert few.document_ids == zero.document_ids and few.tokens == zero.tokens == (15,) * 5
    assert few.loss != zero.loss
    with pytest.raises(UserError, match="shots must be at most the 8 blocks of training text, got 9"):
        with_context(ingredients.test, ingredients.train, 9, 0)
    with torch.no_grad():
        logits = ingredients.model(input_ids=torch.from_numpy(longer.input_ids)).logits[:, 32:-1]
    target = torch.from_numpy(ingredients.test.input_ids[:, 1:])
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), target.flatten())
    assert few.loss == pytest.approx(by_hand.item(), rel=1e-5)


def test_nearest_prototypes_learn_what_a_token_says(subjects):
    """Classes that differ in all their tokens are told apart from a few examples; the shots decide, not the split."""
    run, ingredients = subjects[SENTIMENT]
    texts = tuple([257, *[10 + 100 * (i % 2)] * (3 + i % 4)] for i in range(12))
    clear = Examples(texts, np.arange(12) % 2, tuple(map(str, range(12))))
    clear = dataclasses.replace(ingredients, train=clear, test=clear)
    assert nearest_prototype(run, clear, 2, 0).metrics["accuracy"] == 1
    one, same, other = (nearest_prototype(run, ingredients, 3, seed).logits for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    named = nearest_prototype(run, ingredients, 0, 0)
    assert named.logits.shape == (10, 2) and (np.abs(named.logits) <= 1 + 1e-9).all()
    assert np.array_equal(named.logits, nearest_prototype(run, ingredients, 0, 1).logits)


def test_plan():
    plan = trials(SCALES["cpu"], "cpu")
    assert len({spec.trial_id for spec in plan}) == len(plan) == 8 * (2 + 3 + 2 + 12) + 10 * 2
    quality = [spec for spec in plan if spec.factors["measure"] == "quality"]
    for task, methods in ((LM, {"sft", "lora", "qlora"}), (SENTIMENT, set(METHODS))):
        assert {s.factors["method"] for s in quality if s.factors["track"] == task} == methods | {ZERO_SHOT, FEW_SHOT}


def test_every_claim_names_methods_and_tasks_of_the_plan_of_its_scale():
    plan = trials(SCALES["cpu"], "cpu")
    known = {(s.factors["track"], s.factors.get("method")) for s in plan}
    for claim in CLAIMS:
        text = json.dumps(dataclasses.asdict(claim.estimand))
        task = claim.estimand.where["track"]
        named = {m for m in (*METHODS, ZERO_SHOT, FEW_SHOT) if f'"method": "{m}"' in text}
        assert named and all((task, m) in known for m in named), claim.id


def test_classic_differs_from_sft_in_precision_and_decay_alone():
    plan = [spec for spec in trials(SCALES["cpu"], "cpu") if spec.factors["track"] == SENTIMENT]
    sft, classic = (_run(next(s for s in plan if s.factors.get("method") == name)) for name in ("sft", "classic"))
    assert (sft.precision, sft.weight_decay) == ("bf16", 0.0)
    assert classic == dataclasses.replace(sft, precision="fp32", weight_decay=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("lora", "qlor")}, r"unknown method 'qlor'; did you mean qlora"),
        ({"methods": ("lora", "lora")}, "methods must be named once each, got lora lora"),
        ({"methods": ()}, "methods must be named once each, got none"),
        ({"steps": 2}, "steps must be at least 3, got 2"),
        ({"tuning_runs": 0}, "tuning_runs must be at least 1, got 0"),
        ({"target": 1.0}, r"target must be in \(0, 1\), got 1\.0"),
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"random_init": True}, "qlora quantises pretrained weights, got random ones; leave it out of --methods"),
    ],
)
def test_wrong_runs(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SCALES["cpu"].classification, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, r"seeds must be in \[1, 9995\], got 0"),
        ({"cost_seeds": 10_000}, r"cost_seeds must be in \[1, 9995\], got 10000"),
        ({"common_rates": 6}, "common rates must be at least 1 and at most the 5 tuning runs, got 6"),
        (
            {"classification": dataclasses.replace(SCALES["cpu"].classification, lowest_rate=0.1)},
            "learning rates must be an interval",
        ),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SCALES["cpu"], **change)


def test_qlora_through_a_whole_trial(folders, tmp_path):
    """Cost of methods side by side, on weights from a folder: what smoke, on random ones, cannot show."""
    smoke = SCALES["smoke"]
    run = dataclasses.replace(
        smoke.language_modelling, model=str(folders[LM]), random_init=False, methods=("classic", "lora", "qlora")
    )
    settings = dataclasses.replace(smoke, language_modelling=run)
    (spec,) = (s for s in trials(settings, "smoke") if s.factors == {"measure": "cost", "track": LM})
    measured = run_trial(spec, Context(tmp_path))
    assert failed(measured.checks) == []
    rows = {(o.metric, o.model_dump()["method"]): o.value for o in measured.observations}
    assert rows["parameter_bytes", "qlora"] < rows["parameter_bytes", "lora"]
    assert rows["trainable_params", "qlora"] == rows["trainable_params", "lora"]
    assert (
        rows["base_params", "qlora"]
        == rows["base_params", "lora"]
        == sum(p.numel() for p in plain_model(LM).parameters())
    )
    assert rows["step_time_sec", "qlora"] > 0
