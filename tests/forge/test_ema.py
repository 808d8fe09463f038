"""EMAModel: closed forms, reference match, what is averaged, applying and bad input (section «EMA» of THEORY.md)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from forge.ema import EMAModel, averaging_horizon, compute_optimal_decay, decay_label, initial_weight_share
from tests.forge.tensors import same, weights_of

DECAYS = (0.5, 0.9, 0.999)


def tiny_gpt2() -> GPT2LMHeadModel:
    """A random GPT-2 with tied embeddings."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=40))


def tiny_llama(**options: object) -> LlamaForCausalLM:
    """A random Llama with untied embeddings."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=40, **options))


def single(values: Tensor) -> nn.ParameterList:
    """A model of one parameter."""
    return nn.ParameterList([nn.Parameter(values.clone())])


@torch.no_grad()
def jitter(model: nn.Module, scale: float = 0.1) -> None:
    """Move every parameter at random, as an optimizer step would."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter, dtype=torch.float32).to(parameter.dtype), alpha=scale)


@torch.no_grad()
def walk(model: nn.ParameterList, trajectory: Iterable[Tensor], *averages: EMAModel) -> None:
    for weights in trajectory:
        model[0].copy_(weights)
        for ema in averages:
            ema.update()


# Closed forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 4096 + 5])
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("decays", [(0.9,), DECAYS])
def test_average_is_the_geometric_sum_over_the_trajectory(
    size: int, bias_correction: bool, decays: tuple[float, ...]
) -> None:
    trajectory = torch.randn(26, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = single(trajectory[0])
    ema = EMAModel(model, decays, bias_correction=bias_correction)
    walk(model, trajectory[1:], ema)
    for decay in decays:
        shares = torch.tensor([decay ** (25 - k) for k in range(1, 26)], dtype=torch.float64)
        total = (shares[:, None] * trajectory[1:]).sum(0)
        from_start = decay**25 * trajectory[0] + (1 - decay) * total
        expected = total / shares.sum() if bias_correction else from_start
        assert ema.averages(decay)["0"].dtype == torch.float64
        torch.testing.assert_close(ema.averages(decay)["0"], expected, rtol=1e-12, atol=1e-12)


def test_bias_correction_forgets_the_initial_weights_at_the_first_update() -> None:
    model = single(torch.full((5,), 1e6))
    ema = EMAModel(model, 0.9999, bias_correction=True)
    walk(model, [torch.arange(5.0)], ema)
    assert torch.equal(ema.averages()["0"], torch.arange(5.0))


def test_update_every_n_keeps_the_half_life() -> None:
    trajectory = [torch.randn(7) for _ in range(7)]
    model = single(trajectory[0])
    ema, by_hand = EMAModel(model, 0.9, update_every=3), EMAModel(model, 0.9**3)
    for step, weights in enumerate(trajectory[1:], start=1):
        walk(model, [weights], ema, *([by_hand] if step % 3 == 0 else []))
    assert ema.step == 6
    torch.testing.assert_close(ema.averages()["0"], by_hand.averages()["0"])


def test_update_after_step_starts_the_average_there() -> None:
    trajectory = [torch.randn(7) for _ in range(7)]
    model = single(trajectory[0])
    late = EMAModel(model, 0.9, update_after_step=4)
    walk(model, trajectory[1:5], late)
    assert torch.equal(late.averages()["0"], trajectory[4])
    fresh = EMAModel(model, 0.9)
    walk(model, trajectory[5:], late, fresh)
    assert same(late.averages(), fresh.averages())
    assert not torch.equal(late.averages()["0"], trajectory[6])


def test_intervals_and_bias_correction_count_from_where_the_average_starts() -> None:
    trajectory = torch.randn(12, 7)
    model = single(trajectory[0])
    ema = EMAModel(model, 0.9, bias_correction=True, update_every=3, update_after_step=4)
    walk(model, trajectory[1:], ema)  # updates at steps 7 and 10
    expected = (0.9**3 * trajectory[7] + trajectory[10]) / (0.9**3 + 1)
    torch.testing.assert_close(ema.averages()["0"], expected)


def test_optimal_decay_halves_the_initial_share_in_a_tenth_of_the_run() -> None:
    assert compute_optimal_decay(10_000) == pytest.approx(0.99931, abs=5e-6)
    for steps in (1, 77, 10_000):
        assert initial_weight_share(compute_optimal_decay(steps), steps) == pytest.approx(0.5**10)
    assert compute_optimal_decay(1_000) ** 100 == pytest.approx(0.5)
    assert averaging_horizon(0.99) == pytest.approx(100)
    assert decay_label(compute_optimal_decay(10_000)) == "0.999307"


def test_matches_swa_utils() -> None:
    model = tiny_gpt2()
    ema = EMAModel(model, 0.95)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    reference.update_parameters(model)  # its first update only copies θ(0)
    for _ in range(20):
        jitter(model)
        ema.update()
        reference.update_parameters(model)
    expected = dict(reference.module.named_parameters())
    for name, average in ema.averages().items():
        torch.testing.assert_close(average, expected[name], rtol=1e-6, atol=1e-6)


# Several decays, dtypes, layouts, devices -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (4096,), (3, 4097), (1025, 4096)])
def test_several_decays_at_once_equal_single_ones_bitwise(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = single(torch.randn(shape, dtype=dtype))
    together, alone = EMAModel(model, DECAYS), [EMAModel(model, d) for d in DECAYS]
    for _ in range(3):
        jitter(model)
        for ema in (together, *alone):
            ema.update()
    for decay, ema in zip(DECAYS, alone, strict=True):
        assert ema.averages()["0"].shape == shape
        assert same(together.averages(decay), ema.averages())


def test_fp32_average_of_bf16_weights_moves_where_a_bf16_average_cannot() -> None:
    model = single(torch.ones(4, dtype=torch.bfloat16))
    ema, in_bf16 = EMAModel(model, 0.9999), torch.ones(4, dtype=torch.bfloat16)
    for _ in range(100):
        walk(model, [torch.full((4,), 2.0, dtype=torch.bfloat16)], ema)
        in_bf16.lerp_(model[0].detach(), 1 - 0.9999)
    assert torch.equal(in_bf16, torch.ones(4, dtype=torch.bfloat16))
    assert ema.averages()["0"].dtype == torch.float32
    torch.testing.assert_close(ema.averages()["0"], torch.full((4,), 2 - 0.9999**100))


@pytest.mark.parametrize("decays", [(0.9,), DECAYS])
def test_non_contiguous_parameter(decays: tuple[float, ...]) -> None:
    transposed = torch.randn(70, 80).t()
    model, plain = single(transposed), single(transposed.contiguous())
    assert not model[0].is_contiguous()
    left, right = EMAModel(model, decays), EMAModel(plain, decays)
    target = torch.randn(80, 70)
    walk(model, [target], left)
    walk(plain, [target], right)
    assert same(left.averages(0.9), right.averages(0.9))
    with left.use_ema(0.9):
        torch.testing.assert_close(model[0], torch.lerp(transposed, target, 0.1))
    assert torch.equal(model[0], target)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decays", [(0.9,), DECAYS])
def test_averages_follow_the_model_to_the_gpu_unless_they_have_a_device(decays: tuple[float, ...]) -> None:
    model = tiny_gpt2()
    ema, on_cpu = EMAModel(model, decays), EMAModel(model, decays, device="cpu")
    model.to("cuda")
    jitter(model)
    ema.update()
    on_cpu.update()
    assert {t.device.type for t in ema.averages(0.9).values()} == {"cuda"}
    for name, average in on_cpu.averages(0.9).items():
        assert average.device.type == "cpu"
        torch.testing.assert_close(average, ema.averages(0.9)[name].cpu())


def test_device_option_is_where_the_averages_are_made() -> None:
    assert {t.device.type for t in EMAModel(tiny_gpt2(), device="meta").averages().values()} == {"meta"}


# What is averaged -----------------------------------------------------------------------------------------------------


def test_tied_weights_are_averaged_once() -> None:
    model = tiny_gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    ema = EMAModel(model, (0.9, 0.99))
    distinct = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert len(ema.averages(0.9)) == len(model.state_dict()) - 1
    assert ema.extra_bytes == 2 * 4 * distinct


def test_frozen_parameters_are_neither_averaged_nor_written() -> None:
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    ema = EMAModel(model)
    assert set(weights_of(model)) - set(ema.averages()) == {"model.embed_tokens.weight"}
    assert "model.embed_tokens.weight" in EMAModel(model, trainable_only=False).averages()
    jitter(model)
    frozen = model.model.embed_tokens.weight.clone()
    with ema.use_ema():
        assert torch.equal(model.model.embed_tokens.weight, frozen)


def test_lora_averages_only_the_adapters() -> None:
    import peft

    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    names = EMAModel(model).averages().keys()
    assert len(names) == 4 and all("lora_" in name for name in names)


def test_quantised_and_integer_parameters_are_skipped() -> None:
    import bitsandbytes as bnb

    model = nn.ParameterDict(
        {
            "frozen": nn.Parameter(torch.randn(3), requires_grad=False),
            "int8": nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False),
            "float8": nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False),
            "bf16_storage": bnb.nn.Params4bit(torch.randn(8, 8), requires_grad=False, quant_storage=torch.bfloat16),
            "weight": nn.Parameter(torch.randn(3)),
        }
    )
    assert set(EMAModel(model, trainable_only=False).averages()) == {"frozen", "weight"}


# Applying -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_use_ema_restores_the_raw_weights_bitwise(fails: bool) -> None:
    model = tiny_gpt2().bfloat16()
    ema = EMAModel(model, DECAYS)
    jitter(model)
    ema.update()
    raw = weights_of(model)
    try:
        with ema.use_ema(0.9):
            assert same(weights_of(model), {n: t.bfloat16() for n, t in ema.averages(0.9).items()})
            assert not same(weights_of(model), raw)
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert same(weights_of(model), raw)


def test_apply_then_restore() -> None:
    model = tiny_gpt2()
    ema = EMAModel(model)
    jitter(model)
    raw = weights_of(model)
    ema.apply_ema()
    assert same(weights_of(model), ema.averages())
    ema.restore()
    assert same(weights_of(model), raw)
    ema.apply_ema(backup=False)
    with pytest.raises(RuntimeError, match="nothing to restore"):
        ema.restore()


def test_a_loaded_state_drops_the_backup() -> None:
    """The weights that the model holds then are the raw ones: putting back older ones would undo them."""
    model = tiny_gpt2()
    ema = EMAModel(model)
    state = ema.state_dict()
    ema.apply_ema()
    ema.load_state_dict(state)
    with pytest.raises(RuntimeError, match="nothing to restore"):
        ema.restore()
    ema.update()


def test_misuse_while_applied_is_an_error_and_changes_nothing() -> None:
    model = tiny_gpt2()
    ema = EMAModel(model)
    jitter(model)
    raw, averages = weights_of(model), {n: t.clone() for n, t in ema.averages().items()}
    with ema.use_ema():
        for misuse in (ema.update, ema.apply_ema, ema.use_ema().__enter__):
            with pytest.raises(RuntimeError, match="restore"):
                misuse()
    assert ema.step == 0 and same(ema.averages(), averages) and same(weights_of(model), raw)


def test_state_of_other_decays_names_or_shapes_is_refused_and_changes_nothing() -> None:
    model = tiny_gpt2()
    ema = EMAModel(model, (0.9, 0.99))
    before = {d: {n: t.clone() for n, t in ema.averages(d).items()} for d in ema.decays}
    jitter(model)
    good = EMAModel(model, (0.9, 0.99)).state_dict() | {"step": 7}
    reshaped, renamed = EMAModel(model, (0.9, 0.99)).state_dict(), EMAModel(model, (0.9, 0.99)).state_dict()
    reshaped["averages"]["0.99"]["transformer.ln_f.bias"] = torch.zeros(3)
    renamed["averages"]["0.99"]["other"] = renamed["averages"]["0.99"].pop("transformer.ln_f.bias")
    for state, message in [
        (EMAModel(model, 0.9).state_dict(), r"decays \[0.9\], this one \[0.9, 0.99\]"),
        (reshaped, r"ln_f.bias must have the shape of the model, \(16,\), got \(3,\) in the saved EMA; load"),
        (renamed, r"2 differ, the first is other"),
        ({"model": {}}, "must have 'averages', got .'model'."),
    ]:
        with pytest.raises(ValueError, match=message):
            ema.load_state_dict(state)
        assert ema.step == 0 and all(same(ema.averages(d), before[d]) for d in ema.decays)
    ema.load_state_dict(good)
    assert ema.step == 7 and same(ema.averages(0.99), weights_of(model))


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "message"),
    [(d, rf"decay must be a number in \(0, 1\), got {d!r}; pass") for d in (0, 1, 1.5, -0.1, math.nan, "0.9", None)]
    + [
        ((0.9, "0.99"), r"got '0.99'"),
        ((0.9, 0.99, 0.9), r"decays must differ in six digits, got 0.9, 0.99, 0.9; drop"),
        ((), "at least one decay is needed, got none; pass"),
    ],
)
def test_bad_decay(decay: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMAModel(single(torch.ones(1)), decay)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [0, -1, 2.5, "10", True])
def test_bad_total_steps(steps: object) -> None:
    with pytest.raises(ValueError, match=f"total_steps must be a whole number of at least 1, got {steps!r}"):
        compute_optimal_decay(steps)  # type: ignore[arg-type]


def test_other_bad_input() -> None:
    model = tiny_gpt2()
    with pytest.raises(ValueError, match="update_every must be a whole number of at least 1, got 0"):
        EMAModel(model, update_every=0)
    with pytest.raises(ValueError, match="update_after_step must be a whole number of at least 0, got -1"):
        EMAModel(model, update_after_step=-1)
    with pytest.raises(ValueError, match=r"no parameter transformer.ln_f.wieght; near misses: .*ln_f.weight"):
        EMAModel(model, names=["transformer.ln_f.wieght"])
    for decay, got in ((None, "got None"), (0.5, "got 0.5")):
        with pytest.raises(ValueError, match=rf"one of those followed, \[0.9, 0.99\], {got}"):
            EMAModel(model, (0.9, 0.99)).averages(decay)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable floating-point parameters to average; unfreeze some"):
        EMAModel(model)
    model.transformer.wte.weight.ds_id = 0
    with pytest.raises(NotImplementedError, match=r"wte.weight is sharded.*use DDP"):
        EMAModel(model, trainable_only=False)
