"""The design of ``training_mechanics``: each measurement sees what it is for, and what would break it; wrong input."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, default_data_collator

from analysis.estimands import per_seed_values
from analysis.load import load_campaigns
from experiments.harness import mechanics, step_mechanics
from experiments.harness.causal_lm import CausalLMRun
from experiments.harness.experiment import UserError
from experiments.harness.generation import CACHED, UNCACHED, GenerationFlops, cache_bytes, observe_decoding
from experiments.harness.models import load_tokenizer
from experiments.harness.record import Measurements
from experiments.run import main
from experiments.training_mechanics import CLAIMS, EXPERIMENT, SCALES, run_trial, trials
from forge.presets import get_preset

WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMOKE = SCALES["smoke"]


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, num_key_value_heads=2, pad_token_id=256, **WIDTHS))


@pytest.fixture
def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=257, **WIDTHS))


def tokens(rows, length, seed=0):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def ratio(into, **conditions):
    rows = [o for o in into.observations if all(getattr(o, k, None) == v for k, v in conditions.items())]
    norms = {o.metric: o.value for o in rows}
    return norms["difference_norm"] / norms["reference_norm"]


def difference(value, reference):
    into = Measurements()
    mechanics.observe_difference(into, value, reference)
    return ratio(into)


def failed(into):
    return {check.name for check in into.checks if not check.passed}


def test_a_difference_by_hand():
    assert difference(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"must have one shape, got \[2\] and \[1\]"):
        difference(torch.zeros(2), torch.zeros(1))


def with_lora(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize(("weights", "low", "high"), [("fp32", 0, 1e-5), ("bf16", 1e-5, 0.1)])
def test_merging_is_as_exact_as_the_storage(llama, weights, low, high):
    model = with_lora(llama)
    mechanics.draw_adapters(model)
    beside, merged_logits, merged = mechanics.merged_logits(model, weights, {"input_ids": tokens(2, 12)})
    assert low <= difference(merged_logits, beside) <= high
    assert not any("lora" in name for name, _ in mechanics.architecture(merged))


def test_a_merge_of_a_wrong_scale_is_seen(llama, monkeypatch):
    from peft.tuners.lora.layer import Linear

    true = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 1.01 * true(self, adapter))
    model = with_lora(llama)
    mechanics.draw_adapters(model)
    beside, logits, _ = mechanics.merged_logits(model, "fp32", {"input_ids": tokens(2, 12)})
    assert difference(logits, beside) > 1e-5


def test_four_bits_are_not_merged_exactly(llama, tmp_path):
    """On a small saved model: the weights must exist to be quantised."""
    llama.save_pretrained(tmp_path)
    load_tokenizer("tiny-random").save_pretrained(tmp_path)
    lm = dataclasses.replace(SMOKE.language_modelling, model=str(tmp_path), random_init=False)
    settings = dataclasses.replace(SMOKE, language_modelling=lm)
    (spec,) = [s for s in trials(settings, "smoke") if s.factors == {"measure": "merge", "track": "language_modelling"}]
    into = run_trial(spec, context(tmp_path))
    assert failed(into) == set()
    assert ratio(into, arm="merged", weights="fp32") <= 1e-5 < ratio(into, arm="merged", weights="nf4")
    assert ratio(into, arm="switched_off") == 0


def context(folder):
    return SimpleNamespace(work_dir=folder, report=lambda *_, **__: None, should_stop=lambda: False)


def run_one(measure, track, folder):
    (spec,) = [s for s in trials(SMOKE, "smoke") if s.factors == {"measure": measure, "track": track}]
    return run_trial(spec, context(folder))


@pytest.mark.parametrize("track", ["language_modelling", "classification"])
def test_adapters_start_at_the_base_and_prompts_do_not(track, tmp_path):
    into = run_one("start", track, tmp_path)
    assert ratio(into, group="lora") == ratio(into, group="houlsby") == ratio(into, method="adalora") == 0
    assert ratio(into, group="prompts") > 0
    assert failed(into) == set()


def test_an_adapter_that_does_not_start_at_the_base_is_seen(tmp_path, monkeypatch):
    def drawn(*arguments):
        model = mechanics_build(*arguments)
        mechanics.draw_adapters(model)
        return model

    mechanics_build = mechanics.build
    monkeypatch.setattr(mechanics, "build", drawn)
    into = run_one("start", "language_modelling", tmp_path)
    assert ratio(into, group="lora") > 1e-3
    assert ratio(into, group="houlsby") == 0


def test_full_batch_and_micro_batches(bert, tmp_path):
    """The Trainer's gradient on BERT is as many times too large as there are micro-batches, until it is prepared."""
    step_mechanics.switch_off_dropout(bert)
    labels = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1])
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(tokens(8, 10), labels, strict=True)]
    full = step_mechanics.trainer_gradient(bert, rows, default_data_collator, 1, tmp_path)
    torch.testing.assert_close(full, step_mechanics.mean_gradient(bert, rows, default_data_collator, 1))
    by_formula = step_mechanics.mean_gradient(bert, rows, default_data_collator, 4)
    assert difference(by_formula, full) <= 1e-5
    alone = step_mechanics.trainer_gradient(bert, rows, default_data_collator, 4, tmp_path)
    assert difference(alone, full) == pytest.approx(3, rel=1e-3)
    get_preset("sft").prepare(bert)
    prepared = step_mechanics.trainer_gradient(bert, rows, default_data_collator, 4, tmp_path)
    assert difference(prepared, full) <= 1e-5


def test_dropout_would_be_seen(bert, tmp_path):
    rows = [{"input_ids": ids, "labels": torch.tensor(1)} for ids in tokens(8, 10)]
    full, cut = (step_mechanics.mean_gradient(bert, rows, default_data_collator, parts) for parts in (1, 4))
    assert difference(cut, full) > 0.01


def test_the_mean_of_means_is_not_the_full_batch_where_lengths_differ(tmp_path):
    into = run_one("accumulation", "language_modelling", tmp_path)
    assert ratio(into, way="formula", lengths="equal") <= 1e-5 < 0.01 < ratio(into, way="formula", lengths="ragged")
    assert ratio(into, way="prepared", lengths="ragged") <= 1e-5
    peaks = {o.arm: o.value for o in into.observations if o.metric == "peak_memory_bytes"}
    assert peaks["accumulated"] < peaks["full"]


def test_checkpointing_computes_every_layer_twice(llama):
    batch = {"input_ids": tokens(1, 16), "labels": tokens(1, 16)}
    into = Measurements()
    for arm, entered in (("kept", nullcontext()), ("checkpointed", step_mechanics.checkpointed(llama))):
        with entered:
            step_mechanics.observe_compute(into, llama, batch, arm)
    kept, again = (o.value for o in into.observations)
    head = 6 * 16 * 64 * 257
    assert 1 < again / kept < 4 / 3
    assert kept > head and failed(into) == set()


def test_checkpointing_without_effect_is_seen(llama):
    into = Measurements()
    step_mechanics.observe_compute(into, llama, {"input_ids": tokens(1, 8), "labels": tokens(1, 8)}, "checkpointed")
    assert failed(into) == {"layer_passes checkpointed"}


def test_operations_of_generation_by_hand():
    """Per layer: 2·d·k for the scores, as many for the values, of every new token; the rest as the weights are many."""
    config = LlamaConfig(vocab_size=257, num_key_value_heads=2, **WIDTHS)
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    counter = GenerationFlops(config)
    for k in (2, 7, 20):
        cached, uncached = counter.at(k, CACHED), counter.at(k, UNCACHED)
        assert cached["attention"] == 2 * 4 * 64 * k
        assert uncached["attention"] == 2 * 4 * 64 * k * k
        assert cached["step"] == cached["attention"] + 2 * weights + 2 * 64 * 257
        assert uncached["step"] == uncached["attention"] + 2 * weights * k + 2 * 64 * 257


def test_a_cache_does_not_change_the_logits(llama):
    into = Measurements()
    observe_decoding(into, llama, tokens(1, 24), (2, 24), rounds=1)
    assert failed(into) == set()
    assert ratio(into, arm=CACHED, context=24) <= 1e-5
    assert cache_bytes(llama.config, 23) == 2 * 2 * 2 * 16 * 23 * 4


def test_a_cache_of_other_text_is_seen(llama, monkeypatch):
    from experiments.harness import generation

    true = generation.next_logits

    def spoilt(model, ids, cache=None):
        if cache is not None:
            cache.layers[0].values[:, :, 0] += 1
        return true(model, ids, cache)

    monkeypatch.setattr(generation, "next_logits", spoilt)
    into = Measurements()
    observe_decoding(into, llama, tokens(1, 8), (8,), rounds=1)
    assert ratio(into, arm=CACHED, context=8) > 1e-5


def test_a_smoke_run_estimates_all_but_what_needs_weights_or_a_gpu(tmp_path, capsys):
    places = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"), "--wandb", "disabled"]
    assert main(["training_mechanics", "--scale", "smoke", *places]) == 0, capsys.readouterr().err
    ((campaign,), problems) = load_campaigns(tmp_path / "results")
    assert problems == [] and len(campaign.ok_records) == campaign.n_planned
    absent = {"mechanics-merge-exact-nf4", "mechanics-offload-optimizer-saves-memory"}
    absent |= {"mechanics-offload-optimizer-costs-time"}
    for claim in CLAIMS:
        if claim.id not in absent:
            assert per_seed_values(claim.estimand, campaign.observations).notna().all(), claim.id


def test_the_plan():
    plan = trials(SCALES["cpu"], "cpu")
    count = {m: sum(s.factors["measure"] == m for s in plan) for m in {s.factors["measure"] for s in plan}}
    assert count == {
        "start": 6, "accumulation": 6, "generation_flops": 1, "merge": 20, "checkpointing": 20, "generation": 10,
    }  # fmt: skip
    assert {s.factors["measure"] for s in trials(SCALES["gpu"], "gpu")} == {*count, "offload"}
    assert len({s.campaign_id for s in plan}) == 1
    assert all(c.id.startswith("mechanics-") and c.section == "lecture" for c in EXPERIMENT.claims)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"exact_seeds": 0}, "exact_seeds must be at least 1, got 0"),
        ({"large_batch": 0}, "large_batch must be at least 1, got 0"),
        ({"timed_rounds": 0}, "timed_rounds must be at least 1, got 0"),
        ({"timed_contexts": (1, 8)}, "timed_contexts must be at least 2 each, got 1 8"),
        ({"timed_contexts": ()}, "timed_contexts must be at least 2 each, got none"),
        ({"offload": ("weights",)}, "offload must be of activations, optimizer, got weights"),
        ({"micro_batches": 3}, "batch_size must be a multiple of micro_batches, got 8 and 3"),
        ({"language_modelling": CausalLMRun(method="lora")}, "method must be full"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SCALES["cpu"], **changes)


def test_a_text_that_is_too_short(tmp_path):
    (spec,) = [s for s in trials(SMOKE, "smoke") if s.factors["measure"] == "generation"]
    long = spec.model_copy(update={"settings": {**spec.settings, "timed_contexts": [10_000_000]}})
    with pytest.raises(UserError, match="timed_contexts must fit into"):
        run_trial(long, context(tmp_path))
