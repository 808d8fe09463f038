"""Held-out loss by document, against a computation by hand and against the model's own loss; measured memory."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from experiments.harness.data import Blocks
from experiments.harness.evaluation import held_out_loss
from experiments.harness.memory import allocated_bytes, memory_by_component
from experiments.harness.models import load_causal_lm


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return load_causal_lm("tiny-random")


@pytest.fixture(scope="module")
def blocks():
    """Three blocks of five tokens; document b spans two of them, d has no predicted token."""
    ids = np.random.default_rng(0).integers(0, 256, (3, 5))
    owner = np.array([[0, 0, 0, 1, 1], [1, 1, 2, 2, 2], [3, 0, 0, 0, 0]])
    return Blocks(ids, owner, ("a", "b", "c", "d"))


def by_hand(model, blocks):
    """Document → [sum of −log p(token | its block so far), number of predicted tokens]."""
    sums = {}
    for ids, owner in zip(blocks.input_ids, blocks.document, strict=True):
        for t in range(1, len(ids)):
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(ids[None, :t])).logits[0, -1].double()
            nll = torch.logsumexp(logits, 0) - logits[ids[t]]
            entry = sums.setdefault(blocks.document_ids[owner[t]], [0.0, 0])
            entry[0] += float(nll)
            entry[1] += 1
    return sums


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_loss_of_every_document_by_hand(model, blocks, batch_size):
    found = held_out_loss(model, blocks, batch_size, nullcontext)
    expected = by_hand(model, blocks)
    assert dict(zip(found.document_ids, found.tokens, strict=True)) == {"a": 6, "b": 3, "c": 3}
    for document, nll in zip(found.document_ids, found.nll, strict=True):
        assert nll == pytest.approx(expected[document][0], rel=1e-5)


def test_the_overall_loss_is_that_of_hugging_face(model, blocks):
    ids = torch.from_numpy(blocks.input_ids)
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    assert held_out_loss(model, blocks, 2, nullcontext).loss == pytest.approx(expected, rel=1e-6)


def test_evaluation_leaves_the_mode_of_the_model_and_draws_no_random_numbers(model, blocks):
    for training in (True, False):
        model.train(training)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        held_out_loss(model, blocks, 2, nullcontext)
        assert model.training is training and torch.equal(torch.get_rng_state(), before)


def test_the_model_is_in_evaluation_mode_inside(model, blocks):
    modes = []
    handle = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    held_out_loss(model.train(), blocks, 2, nullcontext)
    handle.remove()
    assert modes == [False, False]


def test_the_model_runs_under_autocast_and_the_loss_is_still_fp32(model, blocks):
    dtypes = []
    handle = model.lm_head.register_forward_hook(lambda *arguments: dtypes.append(arguments[2].dtype))
    low = held_out_loss(model, blocks, 3, lambda: torch.autocast("cpu", torch.bfloat16)).loss
    handle.remove()
    assert dtypes == [torch.bfloat16]
    assert low == pytest.approx(held_out_loss(model, blocks, 3, nullcontext).loss, abs=0.05)


def test_a_loss_that_is_not_finite_is_reported_as_such(blocks):
    broken = load_causal_lm("tiny-random")
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    assert np.isnan(held_out_loss(broken, blocks, 2, nullcontext).loss)


@pytest.mark.parametrize("count", [1, 1_000, 1_000_000])
def test_allocated_bytes_counts_what_is_kept(count):
    tensor, grown = allocated_bytes(lambda: torch.zeros(count, dtype=torch.float32))
    assert tensor.numel() == count
    assert grown == pytest.approx(4 * count, abs=512 if torch.cuda.is_available() else 0)


def test_allocated_bytes_does_not_count_what_is_released():
    def build():
        passing = torch.ones(500_000)
        return passing[:10].clone() + passing.sum()

    assert allocated_bytes(build)[1] < 1_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="the profiler's log is read on a CPU only")
def test_allocated_bytes_does_not_count_what_an_earlier_recording_left_to_the_garbage_collector():
    def leave():
        cycle = {"tensor": torch.zeros(1_000)}
        cycle["self"] = cycle

    def build():
        gc.collect()
        return torch.zeros(10)

    gc.disable()
    try:
        assert allocated_bytes(leave)[1] == 4_000
        assert allocated_bytes(build)[1] == 40
    finally:
        gc.enable()


def test_memory_by_component(model):
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 2)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    memory = memory_by_component(model, optimizer)
    assert memory["parameters"] == 4 * sum(p.numel() for p in model.parameters())
    assert memory["gradients"] == 4 * sum(p.numel() for p in trainable) < memory["parameters"]
    assert memory["optimizer"] == 2 * memory["gradients"] + 4 * len(trainable)
