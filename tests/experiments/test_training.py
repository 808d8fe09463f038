"""Training that is interrupted at any step and resumed ends bitwise as if it had not been."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from experiments.harness.data import load_corpus, pack
from experiments.harness.experiment import Preempted
from experiments.harness.models import load_tokenizer
from experiments.harness.training import TrainingPlan, train
from forge.ema import EMACallback

STEPS = 12
DECAYS = (0.9, 0.99)


class Context:
    """Asks to stop after given steps, once each."""

    def __init__(self, work_dir, *stop_after):
        self.work_dir = work_dir
        self.steps = []
        self._stop_after = list(stop_after)

    def report(self, step, total, **figures):
        self.steps.append(step)

    def should_stop(self):
        return bool(self._stop_after) and self.steps[-1] >= self._stop_after[0] and bool(self._stop_after.pop(0))

    def wandb_run_id(self):
        return None


@pytest.fixture(scope="module")
def blocks():
    corpus, tokenizer = load_corpus("moby_dick"), load_tokenizer("tiny-random")
    train_text, validation_text = corpus.split("train")[:2], corpus.split("validation")[:1]
    return pack(train_text, tokenizer, 16).spread(10), pack(validation_text, tokenizer, 16).spread(4)


def run(blocks, context, schedule="cosine", seed=0, checkpoint_every=None):
    """One run of a model with dropout, from the last checkpoint in the work folder; epochs are five steps long."""
    plan = TrainingPlan(
        steps=STEPS,
        batch_size=2,
        learning_rate=1e-2,
        schedule=schedule,
        warmup_ratio=0.25,
        weight_decay=0.1,
        precision="fp32",
        seed=seed,
        evaluate_at=(4, 8, 12),
        checkpoint_every=checkpoint_every,
    )
    set_seed(seed)
    config = GPT2Config(vocab_size=257, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=256)
    model = GPT2LMHeadModel(config)
    ema = EMACallback(decay=DECAYS)
    outcome = train(model, *blocks, plan, context, [ema])
    clocks = ("_runtime", "_per_second")
    evaluations = [{k: v for k, v in row.items() if not k.endswith(clocks)} for row in outcome.evaluations]
    return model.state_dict(), [ema.ema.averages(d) for d in DECAYS], evaluations, outcome


def assert_same(found, expected):
    weights, averages, evaluations, _ = found
    for name, tensor in expected[0].items():
        assert torch.equal(weights[name], tensor), name
    for mine, theirs in zip(averages, expected[1], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert evaluations == expected[2]


@pytest.fixture(scope="module")
def uninterrupted(blocks, tmp_path_factory):
    return run(blocks, Context(tmp_path_factory.mktemp("uninterrupted")))


def test_every_planned_evaluation_has_raw_and_averaged_losses(uninterrupted):
    evaluations = uninterrupted[2]
    for key in ("eval_loss", "eval_ema_0.9_loss", "eval_ema_0.99_loss"):
        assert [row["step"] for row in evaluations if key in row] == [4, 8, 12]
    last = {k: v for row in evaluations if row["step"] == 12 for k, v in row.items()}
    assert len({last["eval_loss"], last["eval_ema_0.9_loss"], last["eval_ema_0.99_loss"]}) == 3


@pytest.mark.parametrize("stops", [(4,), (1, 5, 11)], ids=str)
def test_preempted_and_resumed_equals_uninterrupted(blocks, uninterrupted, tmp_path, stops):
    for stop in stops:
        context = Context(tmp_path, stop)
        with pytest.raises(Preempted, match=f"stopped at step {stop} of {STEPS}"):
            run(blocks, context)
        assert max(context.steps) == stop
    context = Context(tmp_path)
    assert_same(run(blocks, context), uninterrupted)
    assert min(context.steps) == stops[-1] + 1, "it started over instead of resuming"


def test_dropout_and_data_order_matter_here(blocks, uninterrupted, tmp_path):
    """Else the tests above would pass without restoring them."""
    other = run(blocks, Context(tmp_path), seed=1)
    assert not torch.equal(other[0]["lm_head.weight"], uninterrupted[0]["lm_head.weight"])


def test_a_wish_to_stop_at_the_last_step_does_not_preempt(blocks, uninterrupted, tmp_path):
    assert_same(run(blocks, Context(tmp_path, STEPS)), uninterrupted)


def test_a_checkpoint_that_was_being_written_is_not_used(blocks, uninterrupted, tmp_path):
    with pytest.raises(Preempted):
        run(blocks, Context(tmp_path, 5))
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.name == "checkpoint-5"
    half = checkpoint.with_name("checkpoint-10")
    shutil.copytree(checkpoint, half)
    (half / "forge_complete").unlink()
    context = Context(tmp_path)
    assert_same(run(blocks, context), uninterrupted)
    assert min(context.steps) == 6 and not half.exists()


def test_without_any_complete_checkpoint_it_starts_over(blocks, uninterrupted, tmp_path):
    with pytest.raises(Preempted):
        run(blocks, Context(tmp_path, 5))
    (tmp_path / "checkpoints/checkpoint-5/forge_complete").unlink()
    context = Context(tmp_path)
    assert_same(run(blocks, context), uninterrupted)
    assert min(context.steps) == 1


def test_a_killed_run_resumes_from_its_periodic_checkpoint(blocks, tmp_path):
    expected = run(blocks, Context(tmp_path / "a"), checkpoint_every=4)

    class Killed(Context):
        def report(self, step, total, **figures):
            super().report(step, total, **figures)
            if step == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(blocks, Killed(tmp_path / "b"), checkpoint_every=4)
    context = Context(tmp_path / "b")
    assert_same(run(blocks, context, checkpoint_every=4), expected)
    assert min(context.steps) == 5


def test_seconds_accumulate_over_interruptions(blocks, tmp_path):
    with pytest.raises(Preempted):
        run(blocks, Context(tmp_path, 5))
    spent = tmp_path / "seconds.json"
    first = json.loads(spent.read_text())
    assert first["training"] > 0 and first["evaluation"] > 0
    spent.write_text(json.dumps({"training": 1000.0, "evaluation": 500.0}))
    with pytest.raises(Preempted):
        run(blocks, Context(tmp_path, 9))
    second = json.loads(spent.read_text())
    assert 1000 < second["training"] < 1100 and 500 < second["evaluation"] < 600
    outcome = run(blocks, Context(tmp_path))[3]
    assert outcome.training_sec > second["training"] and outcome.evaluation_sec > second["evaluation"]


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("constant", 1e-2)])
def test_the_schedule_ends_where_it_should(blocks, tmp_path, schedule, last):
    outcome = run(blocks, Context(tmp_path), schedule=schedule)[3]
    assert outcome.trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(last, abs=1e-12)
    rates = [row["learning_rate"] for row in outcome.trainer.state.log_history if "learning_rate" in row]
    assert max(rates) == pytest.approx(1e-2) and rates[0] < 0.5e-2, "the learning rate is not warmed up"
