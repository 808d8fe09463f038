"""check_gradient_health on models after a backward pass (section «Training Monitor» of THEORY.md)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from forge.monitor import NoGradientsError, check_gradient_health
from tests.forge.monitor_process import make_model

UP_PROJ = "model.layers.1.mlp.up_proj.weight"


def after_backward(model: nn.Module) -> nn.Module:
    rows = torch.randint(0, 100, (2, 8), generator=torch.Generator().manual_seed(1))
    model(input_ids=rows, labels=rows).loss.backward()
    return model


@pytest.fixture
def model() -> nn.Module:
    return after_backward(make_model())


def gradient(model: nn.Module, name: str) -> Tensor:
    found = model.get_parameter(name).grad
    assert found is not None
    return found


def test_norms_are_those_of_torch_and_a_healthy_model_has_no_findings(model: nn.Module) -> None:
    report = check_gradient_health(model)
    expected = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    assert report.norms == pytest.approx(expected, rel=1e-6)
    assert report.total_norm == pytest.approx(float(nn.utils.clip_grad_norm_(model.parameters(), math.inf)), rel=1e-6)
    assert report.healthy and report.findings == report.without_gradient == ()
    assert "healthy" in str(report)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(math.nan, "nan"), (math.inf, "inf"), (1e4, "exploding"), (0.0, "vanishing"), (1e-12, "vanishing")],
)
def test_finding_names_the_parameter_its_layer_and_what_to_try(model: nn.Module, value: float, kind: str) -> None:
    gradient(model, UP_PROJ).fill_(value)
    report = check_gradient_health(model)
    [finding] = report.findings
    assert (finding.parameter, finding.layer, finding.kind) == (UP_PROJ, "model.layers.1", kind)
    assert not report.healthy and report.count(finding.kind) == 1
    text = str(report)
    assert f"{kind} in 1 parameter, in model.layers.1: {UP_PROJ}" in text
    assert ("exactly 0" in text) == (value == 0)


def test_one_nan_beside_infinities_is_nan_and_a_parameter_outside_the_layers_has_no_layer(model: nn.Module) -> None:
    gradient(model, "lm_head.weight")[:2, 0] = torch.tensor([math.nan, math.inf])
    [finding] = check_gradient_health(model).findings
    assert (finding.layer, finding.kind) == (None, "nan")


def test_double_precision(model: nn.Module) -> None:
    model = after_backward(model.double())
    norms = check_gradient_health(model).norms
    assert norms == pytest.approx({n: float(p.grad.norm()) for n, p in model.named_parameters()}, rel=1e-12)


def test_thresholds_are_strict_and_the_loss_scale_is_taken_out(model: nn.Module) -> None:
    bias = nn.Linear(1, 1, bias=False)
    bias.weight.grad = torch.full((1, 1), 8.0)
    assert check_gradient_health(bias, exploding_above=8.0).healthy
    assert check_gradient_health(bias, vanishing_below=8.0).healthy
    assert not check_gradient_health(bias, exploding_above=7.9).healthy
    assert check_gradient_health(bias, scale=4.0).norms == {"weight": 2.0}


def test_norms_take_one_fused_call_per_dtype_and_half_precision_does_not_overflow(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    fused = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda t, *a: (calls.append(len(t)), fused(t, *a))[1])
    norms = check_gradient_health(model).norms
    assert norms == pytest.approx({n: float(p.grad.double().norm()) for n, p in model.named_parameters()}, rel=1e-5)
    half = nn.Linear(300, 300).half()
    assert half.bias is not None
    half.weight.grad, half.bias.grad = torch.full_like(half.weight, 1000.0), torch.ones_like(half.bias)
    report = check_gradient_health(half, exploding_above=1e6)
    assert calls == [2]
    assert report.healthy and report.norms["weight"] == pytest.approx(3e5, rel=1e-4)  # fp16 ends at 65504


def test_model_without_layers_sparse_gradients_and_parameters_outside_the_loss() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    network = nn.ModuleDict({"table": nn.Embedding(5, 2, sparse=True), "unused": nn.Linear(2, 2), "frozen": frozen})
    network["table"](torch.tensor([1, 1])).sum().backward()
    report = check_gradient_health(network)
    assert report.norms == pytest.approx({"table.weight": math.sqrt(8)})
    assert report.without_gradient == ("unused.weight", "unused.bias") and report.healthy
    assert "unused.weight" in str(report)
    assert network["table"].weight.grad is not None
    network["table"].weight.grad *= math.nan
    assert check_gradient_health(network).findings[0].layer is None


def test_bad_input_says_rule_value_and_fix(model: nn.Module) -> None:
    fresh = make_model()
    with pytest.raises(NoGradientsError, match=r"got none in its 30 trainable parameters; check after backward\(\)"):
        check_gradient_health(fresh)
    with pytest.raises(NoGradientsError, match="all parameters are frozen; unfreeze"):
        check_gradient_health(fresh.requires_grad_(False))
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got dict"):
        check_gradient_health({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0 < vanishing_below < exploding_above, got 10.0 and 1.0"):
        check_gradient_health(model, vanishing_below=10.0, exploding_above=1.0)
    with pytest.raises(TypeError, match="vanishing_below must be a number, got True"):
        check_gradient_health(model, vanishing_below=True)
    with pytest.raises(ValueError, match="scale must be finite and positive, got 0"):
        check_gradient_health(model, scale=0.0)
