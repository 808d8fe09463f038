"""AdaLoRA's rank update inside the Trainer."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from forge import MonitorCallback
from forge.adapters import AdaLoraCallback

MODULES, TARGET_R = 4, 2


def adapted(kit, **options):
    model = kit.tiny()
    torch.manual_seed(3)
    settings = {"init_r": 4, "target_r": TARGET_R, "tinit": 2, "tfinal": 3, "deltaT": 1, "total_step": 1000}
    return get_peft_model(model, AdaLoraConfig(**{"task_type": "CAUSAL_LM", **settings, **options}))


def lora_weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


class Ranks(TrainerCallback):
    """Rank of every module after every step, read off the zeros in ``lora_E``."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kw):
        rows = {n: int((p != 0).sum()) for n, p in kw["model"].named_parameters() if "lora_E" in n}
        self.steps.append(rows)


class Calls(TrainerCallback):
    """Whether gradients were there and what ``update_and_allocate`` was called with."""

    def __init__(self, monkeypatch, model):
        self.steps = []
        real = model.base_model.update_and_allocate

        def spy(step):
            self.steps.append((step, all(p.grad is not None for p in model.parameters() if p.requires_grad)))
            return real(step)

        monkeypatch.setattr(model.base_model, "update_and_allocate", spy)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_called_once_per_optimizer_step_with_gradients(kit, tmp_path, monkeypatch, accumulation):
    model = adapted(kit)
    calls = Calls(monkeypatch, model)
    kit.trainer(model, tmp_path, AdaLoraCallback(), gradient_accumulation_steps=accumulation).train()
    assert calls.steps == [(step, True) for step in range(1, 9)]
    assert model.peft_config["default"].total_step == 8


def test_ranks_hit_the_budget_and_differ(kit, tmp_path):
    model, callback, ranks = adapted(kit), AdaLoraCallback(), Ranks()
    kit.trainer(model, tmp_path, callback, ranks, max_steps=12).train()
    assert sum(callback.ranks.values()) == TARGET_R * MODULES
    assert len(set(callback.ranks.values())) > 1
    totals = [sum(step.values()) for step in ranks.steps]
    assert totals[:2] == [4 * MODULES] * 2  # tinit: nothing is reduced yet
    assert totals[-3:] == [TARGET_R * MODULES] * 3  # tfinal: the final ranks train on
    assert totals == sorted(totals, reverse=True)
    assert list(ranks.steps[-1].values()) == list(callback.ranks.values())


def test_without_the_callback_no_rank_is_reduced(kit, tmp_path):
    model, ranks = adapted(kit), Ranks()
    kit.trainer(model, tmp_path, ranks).train()
    assert sum(ranks.steps[-1].values()) == 4 * MODULES


def test_matches_a_loop_by_hand(kit, tmp_path):
    """PEFT's documented loop: backward, optimizer step, ``update_and_allocate``, zero the gradients."""
    model = adapted(kit)
    trainer = kit.trainer(model, tmp_path, AdaLoraCallback(), lr_scheduler_type="constant", max_grad_norm=0.0)
    trainer.train()
    by_hand = adapted(kit, total_step=8)
    optimizer = torch.optim.AdamW([p for p in by_hand.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    torch.manual_seed(trainer.args.seed)
    for step, rows in zip(range(1, 9), kit.trainer(by_hand, tmp_path).get_train_dataloader(), strict=False):
        by_hand.train()(**rows).loss.backward()
        optimizer.step()
        by_hand.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    left, right = lora_weights(model), lora_weights(by_hand)
    assert all(torch.allclose(left[n], right[n], atol=1e-6) for n in left)


def test_the_final_adapter_has_the_reduced_ranks_and_loads(kit, tmp_path):
    model, callback = adapted(kit), AdaLoraCallback()
    kit.trainer(model, tmp_path, callback).train()
    model.save_pretrained(tmp_path / "final")
    loaded = PeftModel.from_pretrained(kit.tiny(), str(tmp_path / "final"))
    sizes = {n.replace("base_model.model.", ""): p.shape[0] for n, p in loaded.named_parameters() if "lora_E" in n}
    assert sizes == {n.replace("base_model.model.", ""): rank for n, rank in callback.ranks.items()}
    inputs = {k: v for k, v in kit.batch().items() if k != "labels"}  # with labels PEFT asks for a trainable adapter
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_resuming_is_bitwise_in_every_phase(kit, tmp_path):
    def run(**resume):
        model, callback = adapted(kit), AdaLoraCallback()
        kit.trainer(model, tmp_path, callback, save_steps=2).train(**resume)
        return lora_weights(model), callback.ranks

    whole, ranks = run()
    for step in (2, 4, 6):  # before, during and after the reduction of ranks
        resumed, ranks_again = run(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert kit.same(whole, resumed) and ranks == ranks_again


def test_a_skipped_optimizer_step_leaves_the_scores_alone(kit, monkeypatch):
    """fp16 overflow: the gradients hold Inf. The final allocation reads no gradients and is never left out."""
    model, callback = adapted(kit, total_step=8), AdaLoraCallback()
    calls = Calls(monkeypatch, model)
    optimizer = SimpleNamespace(step_was_skipped=True)
    kit.train(model, steps=1)
    callback.on_optimizer_step(None, SimpleNamespace(global_step=2), None, model=model, optimizer=optimizer)
    assert calls.steps == [] and model.base_model.rankallocator.exp_avg_ipt == {}
    model(**kit.batch()).loss.backward()
    optimizer.step_was_skipped = False
    callback.on_optimizer_step(None, SimpleNamespace(global_step=3), None, model=model, optimizer=optimizer)
    optimizer.step_was_skipped = True
    callback.on_optimizer_step(None, SimpleNamespace(global_step=4), None, model=model, optimizer=optimizer)
    assert [step for step, _ in calls.steps] == [4, 5]
    assert sum(callback.ranks.values()) == TARGET_R * MODULES


def test_a_step_whose_gradients_were_dropped_leaves_the_scores_alone(kit, tmp_path):
    model, callback = adapted(kit), AdaLoraCallback()
    trainer = kit.trainer(model, tmp_path, callback, MonitorCallback(on_unhealthy="skip"))
    loss_of = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: loss_of(*a, **k) * (math.nan if trainer.state.global_step == 3 else 1)
    trainer.train()
    assert sum(callback.ranks.values()) == TARGET_R * MODULES
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_under_accumulation_the_penalty_counts_once_per_micro_batch(kit, tmp_path):
    """Why the docstring says to divide ``orth_reg_weight`` by the number of micro-batches."""

    def run(weight, accumulation):
        model = adapted(kit, orth_reg_weight=weight)
        options = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
        options |= {"optim": "sgd", "max_grad_norm": 0.0}
        kit.trainer(model, tmp_path, AdaLoraCallback(), **options).train()
        return lora_weights(model)

    whole, divided, kept = run(0.8, 1), run(0.4, 2), run(0.8, 2)
    assert all(torch.allclose(whole[n], divided[n], atol=1e-5) for n in whole)
    assert not all(torch.allclose(whole[n], kept[n], atol=1e-4) for n in whole)


def test_a_training_after_one_that_was_stopped_starts_without_its_scores_and_ranks(kit, tmp_path):
    class StopAtFour(TrainerCallback):
        def on_train_begin(self, args, state, control, **kw):
            at_start.append((dict(allocator.exp_avg_ipt), callback.ranks))

        def on_step_end(self, args, state, control, **kw):
            control.should_training_stop = state.global_step == 4

    model, callback, at_start = adapted(kit), AdaLoraCallback(), []
    allocator = model.base_model.rankallocator
    trainer = kit.trainer(model, tmp_path, callback, StopAtFour())
    trainer.train()
    assert callback.ranks and allocator.exp_avg_ipt
    trainer.train()
    assert at_start == [({}, {}), ({}, {})]


def test_the_best_checkpoint_comes_back_with_its_own_ranks(kit, tmp_path):
    model, callback = adapted(kit), AdaLoraCallback()
    trainer = kit.trainer(
        model,
        tmp_path,
        callback,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")  # the worst one, which nothing has reduced
    assert callback.ranks == {} and model.peft_config["default"].rank_pattern is None


def test_resuming_without_the_state_is_refused(kit, tmp_path):
    kit.trainer(adapted(kit), tmp_path, save_steps=4).train()
    with pytest.raises(FileNotFoundError, match=r"holds no adalora_state.safetensors.*AdaLoraCallback"):
        kit.trainer(adapted(kit), tmp_path, AdaLoraCallback()).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )


def test_a_schedule_that_does_not_fit_is_refused(kit, tmp_path):
    with pytest.raises(ValueError, match=r"tinit \+ tfinal must be below the 8 steps of this run, got 5 \+ 3"):
        kit.trainer(adapted(kit, tinit=5), tmp_path, AdaLoraCallback()).train()
    with pytest.raises(ValueError, match="target_r must be below init_r, got 4 and 4"):
        kit.trainer(adapted(kit, target_r=4), tmp_path, AdaLoraCallback()).train()


def test_a_penalty_that_peft_would_leave_out_is_refused(kit, tmp_path):
    with pytest.raises(ValueError, match=r"must have a task_type.*orth_reg_weight=0.5.*give task_type, or"):
        kit.trainer(adapted(kit, task_type=None), tmp_path, AdaLoraCallback()).train()
    kit.trainer(adapted(kit, task_type=None, orth_reg_weight=0), tmp_path, AdaLoraCallback()).train()


def test_another_method_is_refused(kit, tmp_path):
    with pytest.raises(ValueError, match=r"needs a model with a trainable AdaLoRA adapter, got LoraModel"):
        kit.trainer(get_peft_model(kit.tiny(), LoraConfig()), tmp_path, AdaLoraCallback()).train()
