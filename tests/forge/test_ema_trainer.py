"""EMACallback in the Hugging Face Trainer: updates, evaluation, checkpoints, resuming (section «EMA» of THEORY.md)."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from forge import MonitorCallback
from forge.ema import STATE_FILE, EMACallback, load_ema_file, save_ema_file
from forge.monitor.callback import HISTORY_FILE
from tests.forge.tensors import names_moved, same, weights_of

DECAYS = (0.5, 0.99)


class Twice(Trainer):
    """A subclass with its own loss and its own evaluate()."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return (2 * loss[0], *loss[1:]) if isinstance(loss, tuple) else 2 * loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return super().evaluate(*args, **kwargs)


class Interrupt(TrainerCallback):
    """Stops at a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


def examples(count: int, seed: int) -> list[dict[str, Tensor]]:
    rows = torch.randint(0, 40, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in rows]


def make_trainer(folder: Path, *callbacks: TrainerCallback, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    """Five optimizer steps on a random GPT-2 with dropout, evaluating at steps 2, 4 and 5."""
    compute_metrics, datasets = options.pop("compute_metrics", None), options.pop("eval_dataset", examples(5, seed=2))
    set_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=40, resid_pdrop=0.3)
    settings: dict[str, Any] = {
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
    }
    fixed = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0, "dataloader_pin_memory": False}
    return kind(
        model=GPT2LMHeadModel(config),
        args=TrainingArguments(output_dir=str(folder), **(settings | fixed | options)),
        train_dataset=examples(12, seed=1),
        eval_dataset=datasets,
        compute_metrics=compute_metrics,
        callbacks=list(callbacks),
    )


# Training and evaluation ----------------------------------------------------------------------------------------------


def test_one_update_per_optimizer_step_and_the_trajectory_is_untouched(tmp_path: Path) -> None:
    ema = EMACallback(DECAYS)
    trainer = make_trainer(tmp_path, ema, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.state.global_step == ema.ema.step == 5
    assert not same(ema.ema.averages(0.5), weights_of(trainer.model))
    plain = make_trainer(tmp_path, gradient_accumulation_steps=2)
    plain.train()
    assert same(weights_of(trainer.model), weights_of(plain.model))


def test_the_trajectory_is_untouched_where_batches_draw_from_python_and_numpy(tmp_path: Path) -> None:
    class Shuffled(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss, drawn = super().compute_loss(*args, **kwargs), random.random() + np.random.random()
            return loss if isinstance(loss, tuple) else drawn * loss

    trained = []
    for callbacks in ([], [EMACallback(DECAYS)]):
        trainer = make_trainer(tmp_path, *callbacks, kind=Shuffled)
        trainer.train()
        trained.append(weights_of(trainer.model))
    assert same(*trained)


def test_average_follows_equation_1_over_the_trainers_steps(tmp_path: Path) -> None:
    class Record(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trajectory.append({n: p.detach().clone() for n, p in kwargs["model"].named_parameters()})

    trajectory: list[dict[str, Tensor]] = []
    ema = EMACallback(0.5)
    trainer = make_trainer(tmp_path, ema, Record(), gradient_accumulation_steps=2)
    expected = weights_of(trainer.model)
    trainer.train()
    for weights in trajectory:
        expected = {name: 0.5 * average + 0.5 * weights[name] for name, average in expected.items()}
    for name, average in ema.ema.averages().items():
        torch.testing.assert_close(average, expected[name])


@pytest.mark.parametrize("kind", [Trainer, Twice])
def test_metrics_of_the_averages(tmp_path: Path, kind: type[Trainer]) -> None:
    ema = EMACallback(DECAYS)
    trainer = make_trainer(tmp_path, kind=kind)
    trainer.add_callback(ema)
    assert not any("ema" in key for key in trainer.evaluate())
    trainer.train()
    raw = weights_of(trainer.model)
    metrics = trainer.evaluate()
    assert same(weights_of(trainer.model), raw)
    quiet = make_trainer(tmp_path, kind=kind)
    quiet.model.load_state_dict(trainer.model.state_dict())
    assert metrics["eval_loss"] == quiet.evaluate()["eval_loss"]
    for decay in DECAYS:
        ema.apply_ema(quiet.model, decay)
        assert metrics[f"eval_ema_{decay}_loss"] == quiet.evaluate()["eval_loss"] != metrics["eval_loss"]
        ema.restore()
        logged = [row["step"] for row in trainer.state.log_history if f"eval_ema_{decay}_loss" in row]
        assert logged == [2, 4, 5, 5]


def test_metrics_of_a_dict_of_datasets_and_of_compute_metrics(tmp_path: Path) -> None:
    def count(prediction: Any) -> dict[str, float]:
        return {"examples": len(prediction.predictions), "my_runtime": 1.0}

    ema = EMACallback(0.99)
    datasets = {"near": examples(3, seed=3), "far": examples(4, seed=4)}
    trainer = make_trainer(tmp_path, ema, eval_dataset=datasets, compute_metrics=count, max_steps=2)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_near_ema_0.99_examples"] == 3 and metrics["eval_far_ema_0.99_examples"] == 4
    assert metrics["eval_near_ema_0.99_loss"] != metrics["eval_near_loss"]
    assert metrics["eval_near_ema_0.99_loss"] != metrics["eval_far_ema_0.99_loss"]
    assert "test_ema_0.99_loss" in trainer.evaluate(examples(2, seed=5), metric_key_prefix="test")


def test_what_trls_trainers_gather_keeps_the_name_of_its_weights(tmp_path: Path) -> None:
    def sft(*callbacks: TrainerCallback) -> dict[str, float]:
        plain = make_trainer(tmp_path)
        arguments = SFTConfig(
            output_dir=str(tmp_path), max_steps=3, learning_rate=3e-2, use_cpu=True, bf16=False, report_to=[],
            disable_tqdm=True, gradient_checkpointing=False, save_strategy="no",
        )  # fmt: skip
        words = Tokenizer(WordLevel({str(number): number for number in range(40)}, unk_token="0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="1", eos_token="2")
        rows = Dataset.from_dict({"input_ids": [row["input_ids"].tolist() for row in examples(12, seed=1)]})
        trainer = SFTTrainer(
            plain.model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
            callbacks=[*callbacks],
        )  # fmt: skip
        trainer.train()
        metrics: dict[str, float] = trainer.evaluate()
        return metrics

    plain, followed = sft(), sft(EMACallback(0.99))
    for name in ("eval_loss", "eval_mean_token_accuracy"):
        assert followed[name] == plain[name]
    assert followed["eval_ema_0.99_entropy"] != followed["eval_entropy"]


def test_ignore_keys_reach_the_evaluation_of_the_averages(tmp_path: Path) -> None:
    class Recording(Trainer):
        def prediction_step(self, *args: Any, ignore_keys: list[str] | None = None, **kwargs: Any) -> Any:
            seen.append(ignore_keys)
            return super().prediction_step(*args, ignore_keys=ignore_keys, **kwargs)

    seen: list[list[str] | None] = []
    trainer = make_trainer(tmp_path, EMACallback(0.9), kind=Recording, max_steps=1)
    trainer.train()
    seen.clear()
    trainer.evaluate(ignore_keys=["past_key_values"])
    assert seen == 6 * [["past_key_values"]]


def test_evaluation_can_be_switched_off_and_skips_applied_weights(tmp_path: Path) -> None:
    off, on = EMACallback(0.9, evaluate=False), EMACallback(0.9)
    for ema in (off, on):
        trainer = make_trainer(tmp_path, ema, max_steps=1)
        trainer.train()
        with ema.use_ema():
            assert "eval_ema_0.9_loss" not in trainer.evaluate()
        assert ("eval_ema_0.9_loss" in trainer.evaluate()) == (ema is on)


def test_second_training_starts_anew(tmp_path: Path) -> None:
    ema = EMACallback(0.5)
    trainer = make_trainer(tmp_path, ema)
    trainer.train()
    start = weights_of(trainer.model)
    trainer.args.max_steps, trainer.args.learning_rate = 2, 0.0
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert ema.ema.step == 2 and same(ema.ema.averages(), start)


def test_wrong_options_are_refused_when_the_callback_is_made() -> None:
    state = torch.random.get_rng_state()
    EMACallback()
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="update_every must be"):
        EMACallback(update_every=0)
    with pytest.raises(ValueError, match=r"decay must be a number in \(0, 1\), got 1"):
        EMACallback(1)
    with pytest.raises(TypeError, match="updateevery"):
        EMACallback(updateevery=2)
    with pytest.raises(RuntimeError, match="no EMA yet; train first"):
        EMACallback().use_ema()


def test_named_parameters_alone_are_averaged(tmp_path: Path) -> None:
    ema = EMACallback(0.5, names=["transformer.wte.weight"])
    make_trainer(tmp_path, ema, max_steps=1).train()
    ema.apply_ema(make_trainer(tmp_path).model)
    assert list(ema.ema.averages()) == ["transformer.wte.weight"]


def test_averages_in_one_model_must_be_taken_back_before_another_gets_them(tmp_path: Path) -> None:
    ema = EMACallback(0.5)
    trainer = make_trainer(tmp_path, ema, max_steps=1)
    trainer.train()
    raw = weights_of(trainer.model)
    ema.apply_ema(trainer.model)
    with pytest.raises(RuntimeError, match=r"applied to another model; call restore\(\) first"):
        ema.apply_ema(make_trainer(tmp_path).model)
    ema.restore()
    assert same(weights_of(trainer.model), raw)


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", [False, True])
def test_interrupted_and_resumed_equals_uninterrupted_bitwise(tmp_path: Path, moved: bool) -> None:
    whole = EMACallback(DECAYS, bias_correction=True, update_every=2)
    uninterrupted = make_trainer(tmp_path / "whole", whole, save_strategy="steps", save_steps=3)
    uninterrupted.train()

    first = EMACallback(DECAYS, bias_correction=True, update_every=2)
    make_trainer(tmp_path / "part", first, Interrupt(3)).train()
    assert first.ema.step == 3
    checkpoint = tmp_path / "part" / "checkpoint-3"
    if moved:  # elsewhere, while output_dir holds a checkpoint of the same step with other averages
        elsewhere = checkpoint.rename(tmp_path / "elsewhere")
        shutil.copytree(tmp_path / "whole" / "checkpoint-5", checkpoint)
        checkpoint = elsewhere
    second = EMACallback(DECAYS, bias_correction=True, update_every=2)
    resumed = make_trainer(tmp_path / "part", second)
    torch.rand(3)  # the state of the random numbers comes from the checkpoint
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert resumed.state.global_step == second.ema.step == 5
    assert same(weights_of(resumed.model), weights_of(uninterrupted.model))
    for decay in DECAYS:
        assert same(second.ema.averages(decay), whole.ema.averages(decay))


def test_resuming_without_the_averages_is_an_error_unless_they_are_loaded(tmp_path: Path) -> None:
    first = EMACallback(0.9)
    make_trainer(tmp_path, first, Interrupt(3)).train()
    state = load_ema_file(tmp_path / "checkpoint-3" / STATE_FILE)
    (tmp_path / "checkpoint-3" / STATE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=rf"checkpoint-3 holds no {STATE_FILE}; use a checkpoint that was"):
        make_trainer(tmp_path, EMACallback(0.9)).train(resume_from_checkpoint=True)
    second = EMACallback(0.9)
    second.load_ema_state(state)
    make_trainer(tmp_path, second).train(resume_from_checkpoint=True)
    assert second.ema.step == 5


def test_the_checkpoint_counts_where_a_loaded_state_is_of_another_step(tmp_path: Path) -> None:
    first, second = EMACallback(0.9), EMACallback(0.9)
    make_trainer(tmp_path, first, Interrupt(3)).train()
    second.load_ema_state(first.get_ema_state() | {"step": 2})
    make_trainer(tmp_path, second).train(resume_from_checkpoint=True)
    assert second.ema.step == 5


def test_averages_are_applied_to_a_model_in_which_more_trains(tmp_path: Path) -> None:
    ema = EMACallback(0.5)
    trainer = make_trainer(tmp_path, ema, max_steps=1)
    trainer.model.transformer.wte.weight.requires_grad_(False)
    trainer.train()
    fresh = make_trainer(tmp_path).model
    ema.apply_ema(fresh)
    assert names_moved(ema.ema.averages(), fresh) == set()
    assert "transformer.wte.weight" not in ema.ema.averages()


def test_averages_of_another_step_or_decay_in_a_checkpoint_are_refused(tmp_path: Path) -> None:
    first = EMACallback(0.9)
    make_trainer(tmp_path, first, Interrupt(3)).train()
    save_ema_file(first.get_ema_state() | {"step": 7}, tmp_path / "checkpoint-3" / STATE_FILE)
    with pytest.raises(ValueError, match=r"must be of step 3, got step 7; use an unmixed checkpoint"):
        make_trainer(tmp_path, EMACallback(0.9)).train(resume_from_checkpoint=True)
    save_ema_file(first.get_ema_state(), tmp_path / "checkpoint-3" / STATE_FILE)
    with pytest.raises(ValueError, match=r"the saved EMA follows decays \[0\.9\], this one \[0\.5\]"):
        make_trainer(tmp_path, EMACallback(0.5)).train(resume_from_checkpoint=True)


def test_parameters_that_were_frozen_since_are_averaged_on(tmp_path: Path) -> None:
    class Freeze(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["model"].transformer.wte.weight.requires_grad_(state.global_step < 2)

        on_train_begin = on_step_begin

    whole, resumed = EMACallback(0.5), EMACallback(0.5)
    make_trainer(tmp_path, Freeze(), whole, save_strategy="steps", save_steps=3).train()
    make_trainer(tmp_path, Freeze(), resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(resumed.ema.averages(), whole.ema.averages())


def test_a_hyperparameter_search_saves_in_the_folder_of_its_trial(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, EMACallback(0.5), MonitorCallback(), save_strategy="steps", save_steps=4)
    model = trainer.model
    trainer.model_init = lambda: model
    trainer.hyperparameter_search(hp_space=lambda trial: {"seed": trial.suggest_int("seed", 0, 0)}, n_trials=1)
    for file in (STATE_FILE, HISTORY_FILE):
        assert {path.parent.name for path in tmp_path.rglob(file)} == {"checkpoint-4", "checkpoint-5"}


def test_a_callback_that_resumes_twice_reads_each_checkpoint(tmp_path: Path) -> None:
    again, once = EMACallback(0.9), EMACallback(0.9)
    for folder, learning_rate in (("one", 1e-2), ("other", 1e-3)):
        make_trainer(tmp_path / folder, EMACallback(0.9), Interrupt(3), learning_rate=learning_rate).train()
        make_trainer(tmp_path / folder, again).train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-3"))
    make_trainer(tmp_path / "other", once).train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-3"))
    assert same(again.ema.averages(), once.ema.averages())


def test_best_model_by_the_metric_of_an_average(tmp_path: Path) -> None:
    class WorseAfterTwo(Trainer):
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            output = super().evaluation_loop(*args, **kwargs)
            if kwargs["metric_key_prefix"] == "eval_ema_0.99":
                output.metrics["eval_ema_0.99_loss"] = 1.0 if self.state.global_step == 2 else 2.0
            return output

    class AtTwo(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                kept.append(({n: t.clone() for n, t in ema.ema.averages(0.99).items()}, weights_of(trainer.model)))

    kept: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    ema = EMACallback(DECAYS)
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_ema_0.99_loss", "greater_is_better": False}
    trainer = make_trainer(tmp_path, ema, AtTwo(), kind=WorseAfterTwo, **saving, **best)
    trainer.train()
    assert trainer.state.best_metric == 1.0 and trainer.state.best_global_step == 2
    averages, weights = kept[0]
    assert same(weights_of(trainer.model), weights)
    assert same(ema.ema.averages(0.99), averages) and ema.ema.step == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert load_ema_file(tmp_path / "checkpoint-2" / STATE_FILE)["step"] == 2
    assert not list(tmp_path.rglob("*.tmp"))
