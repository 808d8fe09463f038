"""Power-function averages and what is put together from them, against averages that were followed directly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import forge.posthoc_ema
from forge.ema import EMACallback
from forge.posthoc_ema import (
    PostHocEMACallback,
    PowerEMAModel,
    combine,
    exponential_profile,
    gamma_of,
    power_profile,
    reconstruct,
    sigma_rel_of,
    snapshot_path,
)


def test_widths_and_exponents_are_those_of_the_paper():
    """Section 3.1: σ_rel 0.05 and 0.10 are γ 16.97 and 6.94."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    for width in (0.01, 0.1, 0.25, 12**-0.5):
        assert sigma_rel_of(gamma_of(width)) == pytest.approx(width)


def test_the_width_is_the_standard_deviation_of_the_profile():
    steps = 20_000
    for width in (0.05, 0.2):
        weights, at = power_profile(gamma_of(width), steps), np.arange(1, steps + 1) / steps
        mean = weights @ at
        assert np.sqrt(weights @ (at - mean) ** 2) == pytest.approx(width, rel=1e-3)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3, float("nan")])
def test_widths_out_of_range(width):
    with pytest.raises(ValueError, match=r"sigma_rel must be in \(0, 0\.288675\], got"):
        gamma_of(width)


def walk(steps, size=7):
    torch.manual_seed(0)
    model = nn.Linear(size, size, bias=False)
    for _ in range(steps):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight) * 0.1)
        yield model


def test_the_recursion_has_the_profile_of_its_closed_form():
    path, ema = [], None
    for model in walk(50):
        ema = ema or PowerEMAModel(model, (0.05, 0.2))
        ema.update()
        path.append(model.weight.detach().double().clone())
    for width in (0.05, 0.2):
        weights = torch.from_numpy(power_profile(gamma_of(width), 50)).view(-1, 1, 1)
        wanted = (weights * torch.stack(path)).sum(dim=0)
        torch.testing.assert_close(ema.averages(width)["weight"].double(), wanted, rtol=0, atol=2e-6)


def test_options_that_would_change_the_profile_are_refused():
    with pytest.raises(TypeError, match="takes trainable_only, names, device, update_every, got bias_correction"):
        PowerEMAModel(nn.Linear(2, 2), 0.1, bias_correction=True)


def test_an_average_of_every_third_step_has_the_profile_of_those():
    path, ema = [], None
    for step, model in enumerate(walk(50), start=1):
        ema = ema or PowerEMAModel(model, 0.2, update_every=3)
        ema.update()
        if step % 3 == 0:
            path.append(model.weight.detach().double().clone())
    weights = torch.from_numpy(power_profile(gamma_of(0.2), 16)).view(-1, 1, 1)
    wanted = (weights * torch.stack(path)).sum(dim=0)
    torch.testing.assert_close(ema.averages(0.2)["weight"].double(), wanted, rtol=0, atol=2e-6)


def test_a_stored_profile_is_found_again():
    stored = [power_profile(gamma_of(width), at) for at in (50, 100) for width in (0.05, 0.1)]
    shares, error = combine(stored, stored[2])
    assert error < 1e-6
    assert shares == pytest.approx([0, 0, 1, 0], abs=1e-5)


def test_shares_sum_to_one_so_that_weights_that_stand_still_are_kept():
    """With few snapshots the profile of a wide average is missed by a tenth, its sum not at all."""
    stored = [power_profile(gamma_of(width), at) for at in (50, 100) for width in (0.02, 0.1)]
    shares, error = combine(stored, power_profile(0.0, 100))
    assert error > 0.1
    assert shares.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("width", [0.03, 0.05, 0.08, 0.1, 0.15, 0.2])
def test_twenty_snapshots_of_the_default_widths_reach_others_within_three_percent(width):
    """As the EMA page says; shorter averages are further off."""
    stored = [power_profile(gamma_of(followed), 50 * n) for n in range(1, 21) for followed in (0.05, 0.1)]
    assert combine(stored, power_profile(gamma_of(width), 1_000))[1] < 0.03
    assert combine(stored, power_profile(gamma_of(0.01), 1_000))[1] > 0.1


def test_long_runs_are_compared_in_parts(monkeypatch):
    stored = [power_profile(gamma_of(width), at) for at in (50, 100) for width in (0.05, 0.1)]
    wanted = power_profile(gamma_of(0.08), 100)
    whole = combine(stored, wanted)
    monkeypatch.setattr(forge.posthoc_ema, "_CHUNK_STEPS", 7)
    parts = combine(stored, wanted)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6) and parts[1] == pytest.approx(whole[1], rel=1e-6)


def test_profiles_sum_to_one():
    assert exponential_profile(0.9, 200).sum() == pytest.approx(1)
    assert power_profile(6.94, 200).sum() == pytest.approx(1)


def train(folder, callbacks, resume=None, steps=64, learning_rate=1e-2):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **shape))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 50, (64, 8), generator=generator)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=learning_rate,
        save_steps=32, report_to=[], disable_tqdm=True, use_cpu=True, lr_scheduler_type="constant",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, args, train_dataset=data, callbacks=callbacks).train(resume_from_checkpoint=resume)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with snapshots, and the averages that were followed directly beside them."""
    folder = tmp_path_factory.mktemp("run")
    direct = EMACallback(decay=(0.8, 0.95), evaluate=False, bias_correction=True)
    model = train(folder / "out", [PostHocEMACallback(folder / "snapshots", every_steps=4), direct])
    return folder, direct, model


def test_the_last_step_is_stored_too_and_by_the_process_that_saves_alone(tmp_path, monkeypatch):
    train(tmp_path / "out", [PostHocEMACallback(tmp_path / "snapshots", every_steps=4)], steps=6)
    assert sorted((tmp_path / "snapshots").iterdir()) == [
        snapshot_path(tmp_path / "snapshots", step) for step in (4, 6)
    ]
    monkeypatch.setattr(TrainingArguments, "should_save", False)
    train(tmp_path / "out", [PostHocEMACallback(tmp_path / "none", every_steps=4)], steps=6)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("decay", [0.8, 0.95])
def test_an_exponential_average_is_reconstructed(run, decay):
    folder, direct, model = run
    found, wanted = reconstruct(folder / "snapshots", decay=decay), direct.ema.averages(decay)
    assert found.averages.keys() == wanted.keys()
    raw = dict(model.named_parameters())
    off = sum((found.averages[n] - wanted[n]).square().sum() for n in wanted)
    away = sum((raw[n].detach() - wanted[n]).square().sum() for n in wanted)
    assert found.error < 0.1
    assert off < 0.01 * away


def test_a_power_average_at_another_step_is_reconstructed(run, tmp_path):
    folder, _, _ = run
    direct = PostHocEMACallback(tmp_path / "other", every_steps=50, sigma_rel=(0.08, 0.15))
    train(tmp_path / "out", [direct], steps=50)
    found = reconstruct(folder / "snapshots", sigma_rel=0.15, step=50)
    assert found.error < 0.3
    for name, tensor in direct.ema.averages(0.15).items():
        torch.testing.assert_close(found.averages[name], tensor, rtol=0, atol=5e-3)
    assert reconstruct(folder / "snapshots", sigma_rel=0.15, step=52).error < found.error


def test_averages_of_every_second_step_in_half_precision(run, tmp_path):
    """Half the updates and half the bytes; what is left of the error is small against what averaging does."""
    folder, direct, model = run
    options = {"sigma_rel": (0.025, 0.15), "update_every": 2, "dtype": torch.float16}
    train(tmp_path / "out", [PostHocEMACallback(tmp_path / "snapshots", every_steps=4, **options)])
    found, wanted = reconstruct(tmp_path / "snapshots", decay=0.95), direct.ema.averages(0.95)
    raw = dict(model.named_parameters())
    off = sum((found.averages[n] - wanted[n]).square().sum() for n in wanted)
    away = sum((raw[n].detach() - wanted[n]).square().sum() for n in wanted)
    assert off < 0.01 * away
    assert {tensor.dtype for tensor in found.averages.values()} == {torch.float32}
    sizes = [snapshot_path(where / "snapshots", 64).stat().st_size for where in (tmp_path, folder)]
    assert sizes[0] < 0.6 * sizes[1]


def test_half_precision_is_relative_to_what_training_moves(tmp_path):
    """A fine-tuning that hardly moves the weights: rounded, they would differ by more than averaging changes."""
    steps, exact = 64, EMACallback(decay=0.8, evaluate=False, bias_correction=True)
    half = PostHocEMACallback(tmp_path / "half", every_steps=4, dtype=torch.float16)
    rounded = PostHocEMACallback(tmp_path / "rounded", 4, dtype=torch.float16, relative_to_start=False)
    full = PostHocEMACallback(tmp_path / "full", every_steps=4)
    model = train(tmp_path / "out", [half, rounded, full, exact], steps=steps, learning_rate=1e-6)
    wanted, raw = exact.ema.averages(0.8), dict(model.named_parameters())
    found = {name: reconstruct(tmp_path / name, decay=0.8).averages for name in ("half", "rounded", "full")}

    def distance(first, second):
        return sum((first[n].detach() - second[n]).double().square().sum() for n in wanted) ** 0.5

    assert distance(found["half"], found["full"]) < 0.03 * distance(raw, wanted)
    assert distance(found["rounded"], found["full"]) > distance(raw, wanted)


def test_half_precision_needs_the_weights_at_the_beginning(tmp_path):
    half = PostHocEMACallback(tmp_path / "half", every_steps=32, dtype=torch.float16)
    train(tmp_path / "out", [half])
    elsewhere = PostHocEMACallback(tmp_path / "other", every_steps=32, dtype=torch.float16)
    with pytest.raises(
        FileNotFoundError, match=r"start.safetensors is missing; use the folder that the run began with"
    ):
        train(tmp_path / "out", [elsewhere], resume=tmp_path / "out" / "checkpoint-32")
    before = snapshot_path(tmp_path / "half", 64).read_bytes()
    train(tmp_path / "out", [half], resume=tmp_path / "out" / "checkpoint-32")
    assert snapshot_path(tmp_path / "half", 64).read_bytes() == before
    (tmp_path / "half" / "start.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"start.safetensors is missing"):
        reconstruct(tmp_path / "half", sigma_rel=0.1)


def test_snapshots_after_the_step_are_not_read(run):
    folder, _, _ = run
    whole = reconstruct(folder / "snapshots", sigma_rel=0.1, step=32)
    with_some = [path for path in (folder / "snapshots").iterdir() if path <= snapshot_path(folder / "snapshots", 32)]
    (folder / "some").mkdir()
    for path in with_some:
        (folder / "some" / path.name).hardlink_to(path)
    some = reconstruct(folder / "some", sigma_rel=0.1)
    assert whole.error == some.error
    assert all(torch.equal(whole.averages[name], some.averages[name]) for name in some.averages)


class Stop(TrainerCallback):
    """Ends a run early."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kw):
        control.should_training_stop = state.global_step == self.step


def test_an_interrupted_run_stores_the_same_snapshots(run, tmp_path):
    folder, _, _ = run
    stored = tmp_path / "snapshots"
    train(tmp_path / "out", [PostHocEMACallback(stored, every_steps=4), Stop(34)])
    assert snapshot_path(stored, 34).exists()
    train(tmp_path / "out", [PostHocEMACallback(stored, every_steps=4)], resume=folder / "out" / "checkpoint-32")
    assert [path.name for path in sorted(stored.iterdir())] == [
        path.name for path in sorted((folder / "snapshots").iterdir())
    ]
    for step in (32, 36, 64):
        assert snapshot_path(stored, step).read_bytes() == snapshot_path(folder / "snapshots", step).read_bytes()


def test_another_run_in_the_same_folder_leaves_no_trace(tmp_path):
    stored, direct = tmp_path / "snapshots", EMACallback(decay=0.8, evaluate=False, bias_correction=True)
    train(tmp_path / "out", [PostHocEMACallback(stored, every_steps=4)], learning_rate=1e-1)
    train(tmp_path / "out", [PostHocEMACallback(stored, every_steps=2), direct], steps=24)
    found, wanted = reconstruct(stored, decay=0.8).averages, direct.ema.averages()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-4) for name in wanted)


def test_snapshots_that_were_made_in_different_ways_are_refused(run, tmp_path):
    folder, _, _ = run
    callback = PostHocEMACallback(tmp_path, every_steps=4, dtype=torch.float16)
    train(tmp_path / "out", [callback], steps=4)
    snapshot_path(tmp_path, 8).hardlink_to(snapshot_path(folder / "snapshots", 8))
    with pytest.raises(ValueError, match=r"snapshots must be made alike, got .*delete either kind"):
        reconstruct(tmp_path, decay=0.8)


def test_a_reconstruction_is_written_into_a_model_of_the_same_shapes_only(run):
    folder, _, model = run
    found = reconstruct(folder / "snapshots", sigma_rel=0.1)
    found.apply(model)
    assert all(torch.equal(p, found.averages[n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match=r"the model must have lm_head.weight of shape \(50, 16\), got no"):
        found.apply(nn.Linear(2, 2))


def test_wrong_requests(run, tmp_path):
    folder, _, _ = run
    with pytest.raises(FileNotFoundError, match="holds no snapshot; train with PostHocEMACallback"):
        reconstruct(tmp_path, sigma_rel=0.1)
    with pytest.raises(ValueError, match=r"step must be in \[1, 64\], where the last snapshot is, got 65"):
        reconstruct(folder / "snapshots", sigma_rel=0.1, step=65)
    with pytest.raises(ValueError, match="name either sigma_rel or decay, got"):
        reconstruct(folder / "snapshots", sigma_rel=0.1, decay=0.9)
    with pytest.raises(ValueError, match=r"decay must be a number in \(0, 1\), got 1"):
        reconstruct(folder / "snapshots", decay=1)
    with pytest.raises(ValueError, match="every_steps must be at least 1, got 0"):
        PostHocEMACallback(tmp_path, every_steps=0)
    with pytest.raises(ValueError, match="every_steps must be a multiple of update_every, got 5 and 2"):
        PostHocEMACallback(tmp_path, every_steps=5, update_every=2)
    with pytest.raises(ValueError, match=r"dtype must be of floating point, got torch\.int8"):
        PostHocEMACallback(tmp_path, every_steps=1, dtype=torch.int8)
    with pytest.raises(ValueError, match="two profiles or more"):
        PostHocEMACallback(tmp_path, every_steps=1, sigma_rel=(0.1,))
