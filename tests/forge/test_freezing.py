"""Freezing: what is frozen, that it stays as it is, that the rest trains as before (section «Layer Freezing»)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from forge.freezing import (
    freeze_by_name,
    freeze_embeddings,
    freeze_layers,
    get_memory_savings_estimate,
    setup_lp_lora_style,
    unfreeze,
)
from forge.layers import NoLayersError, find_layers
from tests.forge.tensors import names_moved, weights_of

CAUSAL, MASKED, SEQ2SEQ = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "llama": (CAUSAL, "llama", {}),
    "llama, tied": (CAUSAL, "llama", {"tie_word_embeddings": True}),
    "gpt2": (CAUSAL, "gpt2", {}),
    "opt": (CAUSAL, "opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "falcon": (CAUSAL, "falcon", {}),
    "bloom": (CAUSAL, "bloom", {"n_layer": 4, "n_head": 4}),
    "gpt_neox_japanese": (CAUSAL, "gpt_neox_japanese", {"tie_word_embeddings": False}),
    "mixtral": (CAUSAL, "mixtral", {"num_key_value_heads": 2, "num_local_experts": 2}),
    "mamba": (CAUSAL, "mamba", {"state_size": 4}),
    "jamba": (CAUSAL, "jamba", {"num_key_value_heads": 2, "attn_layer_offset": 1, "attn_layer_period": 2}),
    "xlnet": (CAUSAL, "xlnet", {"d_inner": 64, "d_head": 8}),
    "bert": (MASKED, "bert", {}),
    "roberta": (MASKED, "roberta", {}),
    "electra": (MASKED, "electra", {"embedding_size": 16}),
    "distilbert": (MASKED, "distilbert", {"dim": 32, "hidden_dim": 64, "n_layers": 4, "n_heads": 4}),
    "deberta": (MASKED, "deberta", {}),
    "t5": (SEQ2SEQ, "t5", {"d_ff": 64, "d_kv": 8, "num_hidden_layers": 2, "num_decoder_layers": 2}),
    "bart": (SEQ2SEQ, "bart", {"num_hidden_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64}),
}
ROWS = torch.randint(3, 100, (2, 8), generator=torch.Generator().manual_seed(0))


def build(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    auto, name, own = FAMILIES[family]
    sizes = LLAMA | own | options
    if name == "xlnet":
        del sizes["max_position_embeddings"]  # refused: it has no limit
    if name == "t5":
        sizes["decoder_start_token_id"] = 0
    return auto.from_config(CONFIG_MAPPING[name](**sizes)).train()


def tiny_llama(**options: Any) -> Any:
    return build("llama", **options)


def with_lora(model: nn.Module, **options: Any) -> Any:
    """All-linear LoRA with a start that has gradients everywhere, or what ``options`` say."""
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options)
    )


def backward(model: Any) -> dict[str, Tensor]:
    """Gradients of one batch by name."""
    model.zero_grad()
    torch.manual_seed(2)
    model(input_ids=ROWS, labels=ROWS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model: nn.Module, steps: int = 3) -> None:
    """Steps of AdamW over all parameters, trainable or not, with a strong weight decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(steps):
        backward(model)
        optimizer.step()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def outputs_with_gradient(model: Any) -> list[bool]:
    """For each layer from the bottom, whether its output is part of the backward pass."""
    seen: dict[str, bool] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            seen[name] = (output[0] if isinstance(output, tuple) else output).requires_grad

        return hook

    handles = [layer.module.register_forward_hook(note(layer.name)) for layer in find_layers(model)]
    model(input_ids=ROWS, labels=ROWS)
    for handle in handles:
        handle.remove()
    return [seen[layer.name] for layer in find_layers(model)]


# What is frozen -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_lower_half_is_bitwise_unchanged_and_out_of_the_backward_pass(family: str) -> None:
    model = build(family)
    layers = find_layers(model)
    report = setup_lp_lora_style(model)
    assert report.layers == tuple(layer.name for layer in layers[:2]) and report.total_layers == 4
    assert not any(p.requires_grad for layer in layers[:2] for p in layer.module.parameters())
    assert all(p.requires_grad for layer in layers[2:] for p in layer.module.parameters())
    assert outputs_with_gradient(model) == [False, False, True, True]

    before = weights_of(model)
    train(model)
    moved = names_moved(before, model)
    assert moved.isdisjoint(report.parameters)
    assert all(any(name.startswith(f"{layer.name}.") for name in moved) for layer in layers[2:])


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama, tied", True), ("gpt2", True), ("t5", True)])
def test_embeddings_are_frozen_with_the_layers_unless_told_otherwise(family: str, tied: bool) -> None:
    model = build(family)
    weight = model.get_input_embeddings().weight
    report = setup_lp_lora_style(model)
    assert not weight.requires_grad
    assert report.head_frozen == (not model.get_output_embeddings().weight.requires_grad) == tied
    assert ("tied" in str(report)) == tied

    model = build(family)
    report = setup_lp_lora_style(model, freeze_embeddings=False)
    assert model.get_input_embeddings().weight.requires_grad and not report.head_frozen
    assert outputs_with_gradient(model) == [True] * 4


def test_positions_norms_and_projections_count_as_embeddings_but_heads_do_not() -> None:
    model = build("electra")
    names = set(freeze_embeddings(model).parameters)
    assert {"electra.embeddings.LayerNorm.weight", "electra.embeddings_project.weight"} <= names
    assert {name.split(".")[1] for name in names} == {"embeddings", "embeddings_project"}
    model = build("gpt_neox_japanese")  # its head is called embed_out
    assert freeze_embeddings(model).parameters == ("gpt_neox_japanese.embed_in.weight",)
    model = nn.ModuleDict({"my_embedder": build("bert")})  # a name around the layers says nothing of what it holds
    assert not any("LayerNorm" in name and "embeddings." not in name for name in freeze_embeddings(model).parameters)


@pytest.mark.parametrize(
    ("family", "options", "missing"),
    [
        ("opt", {"word_embed_proj_dim": 16}, "*.project_in.*"),
        (
            "deberta",
            {"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"},
            "*.encoder.LayerNorm.*",
        ),
    ],
)
def test_what_the_docs_say_of_models_with_more_below_the_layers(
    family: str, options: dict[str, Any], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "deberta":
        options = options | {"pos_att_type": ["p2c", "c2p"], "share_att_key": True}
        monkeypatch.setitem(FAMILIES, "deberta", (MASKED, "deberta-v2", {}))
    model = build(family, **options)
    setup_lp_lora_style(model)
    assert outputs_with_gradient(model) == [True] * 4
    freeze_by_name(model, missing)
    assert outputs_with_gradient(model) == [False, False, True, True]


@pytest.mark.parametrize(
    ("ratio", "layers", "frozen"),
    [(0.0, 4, 0), (0.5, 5, 2), (0.29, 100, 29), (0.57, 100, 57), (1 / 3, 3, 1), (0.99, 4, 3), (1, 4, 4), (1.0, 4, 4)],
)
def test_the_share_is_rounded_down_but_not_by_floating_point(ratio: float, layers: int, frozen: int) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_hidden_layers": layers}))
    assert len(setup_lp_lora_style(model, ratio).layers) == frozen


def test_ratio_0_does_nothing_and_unfreezes_nothing() -> None:
    model = tiny_llama()
    model.model.norm.requires_grad_(False)
    before = trainable(model)
    report = setup_lp_lora_style(model, 0.0)
    assert trainable(model) == before and report.parameters == () and report.layers == ()
    assert not model._forward_pre_hooks
    assert setup_lp_lora_style(model.requires_grad_(False), 0.0).trainable_params == 0


def test_freezing_again_adds_to_what_is_frozen() -> None:
    model = tiny_llama()
    setup_lp_lora_style(model, 0.5)
    report = setup_lp_lora_style(model, 0.25)
    assert report.frozen_params == 0 and len(report.layers) == 1
    report = setup_lp_lora_style(model, 0.75)
    assert {name.split(".")[2] for name in report.parameters} == {"2"}


def test_report_counts_and_can_be_taken_back() -> None:
    model = tiny_llama()
    before = trainable(model)
    total = sum(p.numel() for p in model.parameters())
    first = freeze_layers(model, 1)
    second = freeze_layers(model, 3)
    assert total == first.frozen_params + second.frozen_params + second.trainable_params
    assert str(first).startswith("1 of 4 layers frozen, ") and f"{first.frozen_params:,}" in str(first)
    unfreeze(model, second)
    assert trainable(model) == before - set(first.parameters)
    unfreeze(model, first)
    assert trainable(model) == before


def test_encoder_layers_count_first() -> None:
    model = build("t5")
    assert setup_lp_lora_style(model, 0.75).layers == ("encoder.block.0", "encoder.block.1", "decoder.block.0")
    model = build("t5")
    assert setup_lp_lora_style(model, 0.5, stack="decoder.block").layers == ("decoder.block.0",)


def test_by_name() -> None:
    model = build("gpt2")
    report = freeze_by_name(model, ["*.mlp.*", "transformer.h.[01].ln_1.*"])
    assert len(report.parameters) == 4 * 4 + 2 * 2
    assert freeze_by_name(model, "lm_head.weight").parameters == ("transformer.wte.weight",)  # by its other name


def test_a_gradient_that_is_left_moves_nothing() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    backward(model)
    optimizer.step()  # state with momentum for all
    backward(model)
    report = setup_lp_lora_style(model)
    before = weights_of(model)
    optimizer.step()
    assert before.keys() - names_moved(before, model) == set(report.parameters)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["freeze, then checkpoint", "checkpoint, then freeze"])
@pytest.mark.parametrize("kind", ["none", "default", "reentrant"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_gradients_are_those_of_the_unfrozen_model_with_any_checkpointing(
    family: str, lora: bool, kind: str, order: str
) -> None:
    def make() -> Any:
        model = build(family)
        return with_lora(model) if lora else model

    expected = backward(make())
    model = make()
    if order.startswith("freeze"):
        setup_lp_lora_style(model)
    if kind != "none":
        base = model.get_base_model() if lora else model
        base.activation_checkpointing_enable({"use_reentrant": True} if kind == "reentrant" else None)
    if order.startswith("checkpoint"):
        setup_lp_lora_style(model)
    found = backward(model)
    assert found.keys() == trainable(model) & expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
    if kind != "reentrant":
        assert outputs_with_gradient(model) == [False, False, True, True]


def test_reentrant_checkpointing_would_lose_the_gradients_without_the_mark() -> None:
    model = tiny_llama()
    model.activation_checkpointing_enable({"use_reentrant": True})
    setup_lp_lora_style(model)
    model.disable_input_require_grads()
    assert any(name.startswith("model.layers.3.") for name in backward(model))
    model._forward_pre_hooks.clear()
    model.disable_input_require_grads()
    assert not any(name.startswith("model.layers.3.") for name in backward(model))


def test_nothing_changes_for_evaluation_and_one_hook_is_enough() -> None:
    model = tiny_llama()
    setup_lp_lora_style(model, 0.25)
    setup_lp_lora_style(model, 0.5)
    assert len(model._forward_pre_hooks) == 1
    model.activation_checkpointing_enable()
    model.eval()
    model(input_ids=ROWS)
    assert model._require_grads_hooks


# PEFT -----------------------------------------------------------------------------------------------------------------


def test_under_lora_only_the_upper_adapters_train_and_base_weights_never_do() -> None:
    model = with_lora(tiny_llama())
    adapters = trainable(model)
    report = setup_lp_lora_style(model)
    upper = {name for name in adapters if re.search(r"layers\.[23]\.", name)}
    assert trainable(model) == upper and len(upper) == len(adapters) // 2
    before = weights_of(model)
    train(model)
    assert names_moved(before, model) == upper
    unfreeze(model, report)
    assert trainable(model) == adapters


def test_adapters_on_embeddings_are_frozen_with_them_and_prompts_are_not() -> None:
    model = with_lora(build("gpt2"), target_modules=["wte", "c_attn"])
    setup_lp_lora_style(model)
    assert not any("wte" in name for name in trainable(model))
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="needs layers that train"):
        setup_lp_lora_style(model)
    freeze_embeddings(model)
    assert trainable(model) == {"prompt_encoder.default.embedding.weight"}


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_learning_leaves_no_layer_to_freeze(config: Any) -> None:
    model = get_peft_model(tiny_llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"needs layers that train, got none in PeftModelForCausalLM.*prompt learning"):
        setup_lp_lora_style(model)


def test_adalora_is_refused_because_its_rank_update_reads_every_gradient() -> None:
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4, target_r=2, tfinal=2)
    model = get_peft_model(tiny_llama(), config)
    before = trainable(model)
    with pytest.raises(ValueError, match=r"every adapter must train under AdaLoRA.*layers_to_transform"):
        setup_lp_lora_style(model)
    assert trainable(model) == before


# Memory ---------------------------------------------------------------------------------------------------------------


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of gradients and of optimizer state after a step."""
    backward(model)
    optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return tuple(sum(t.numel() * t.element_size() for t in tensors) for tensors in (gradients, states))  # type: ignore


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "cls"), [("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
@pytest.mark.parametrize("family", ["llama", "llama, tied", "bert", "t5"])
def test_savings_are_what_training_really_does_without(
    family: str, name: str, cls: Any, dtype: torch.dtype, lora: bool
) -> None:
    def measure(ratio: float) -> tuple[tuple[int, int], dict[str, float]]:
        model = build(family).to(dtype)
        model = with_lora(model) if lora else model
        setup_lp_lora_style(model, ratio)
        return held_bytes(model, cls(model.parameters())), get_memory_savings_estimate(model, name)

    (full, nothing), (frozen, saved) = measure(0.0), measure(0.5)
    assert nothing == {"gradient_saved_gb": 0, "optimizer_saved_gb": 0, "total_saved_gb": 0}
    assert saved["gradient_saved_gb"] * 1e9 == pytest.approx(full[0] - frozen[0]) and full[0] > frozen[0]
    assert saved["optimizer_saved_gb"] * 1e9 == pytest.approx(full[1] - frozen[1])
    assert saved["total_saved_gb"] * 1e9 == pytest.approx(sum(full) - sum(frozen))


def test_savings_in_closed_form() -> None:
    """A tied embedding counts once; half of the layers is not half of the model."""
    model = build("llama, tied")
    layer = 2 * 32 + 4 * 32 * 32 + 3 * 32 * 64
    frozen = 2 * layer + 100 * 32
    assert setup_lp_lora_style(model).frozen_params == frozen
    saved = get_memory_savings_estimate(model)
    assert saved["gradient_saved_gb"] == 4 * frozen / 1e9
    assert saved["optimizer_saved_gb"] == (8 * frozen + 4 * (2 * 9 + 1)) / 1e9  # with the step count of each tensor
    assert saved["total_saved_gb"] == saved["gradient_saved_gb"] + saved["optimizer_saved_gb"]


def test_base_weights_under_adapters_and_quantised_weights_save_nothing(tmp_path: Path) -> None:
    zero = {"gradient_saved_gb": 0, "optimizer_saved_gb": 0, "total_saved_gb": 0}
    assert get_memory_savings_estimate(with_lora(tiny_llama())) == zero
    model = tiny_llama()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))  # where transformers itself holds the adapters
    assert get_memory_savings_estimate(model) == zero
    next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    assert get_memory_savings_estimate(model)["gradient_saved_gb"] == 4 * 8 * 32 / 1e9
    for options in ({"bias": "lora_only"}, {"bias": "all", "modules_to_save": ["wte"]}):
        model = with_lora(build("gpt2"), target_modules=["c_attn"], **options)
        assert get_memory_savings_estimate(model) == zero
        report = setup_lp_lora_style(model)
        assert get_memory_savings_estimate(model)["gradient_saved_gb"] == 4 * report.frozen_params / 1e9
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=nf4)
    model.requires_grad_(False)
    model.packed = type("Packed", (nn.Parameter,), {})(torch.zeros(9), requires_grad=False)  # torchao: floats by dtype
    model.float8 = nn.Parameter(torch.zeros(9).to(torch.float8_e4m3fn), requires_grad=False)
    plain = sum(p.numel() for n, p in model.named_parameters() if "proj" not in n and n not in ("packed", "float8"))
    saved = get_memory_savings_estimate(model)["gradient_saved_gb"]
    assert saved == plain * model.model.norm.weight.element_size() / 1e9
    model = with_lora(model)
    assert get_memory_savings_estimate(model) == zero
    report = setup_lp_lora_style(model)
    assert get_memory_savings_estimate(model)["gradient_saved_gb"] == 4 * report.frozen_params / 1e9


def test_an_unknown_optimizer_lists_near_misses() -> None:
    with pytest.raises(ValueError, match=r"optimizer must be .*got 'adamw_torhc'.*adamw_torch"):
        get_memory_savings_estimate(tiny_llama(), "adamw_torhc")


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [-0.1, 1.5, math.nan, math.inf, True, "0.5", None])
def test_a_ratio_outside_0_to_1_is_refused(ratio: Any) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=rf"freeze_ratio must be a number in \[0, 1\], got {re.escape(repr(ratio))}; "):
        setup_lp_lora_style(model, ratio)
    assert len(trainable(model)) == len(list(model.parameters()))


def test_a_ratio_of_less_than_one_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cover at least one of 4 layers, got 0.2; use 0.25 or more"):
        setup_lp_lora_style(tiny_llama(), 0.2)


@pytest.mark.parametrize("count", [-1, 5, 1.0, True, "2"])
def test_a_count_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(ValueError, match=rf"count must be a whole number from 0 to 4.*got {count!r}"):
        freeze_layers(tiny_llama(), count)


def test_a_stack_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stack must be one of encoder.block, decoder.block, got 'decoder'"):
        setup_lp_lora_style(build("t5"), stack="decoder")


@pytest.mark.parametrize(
    "freeze",
    [lambda m: setup_lp_lora_style(m, 1.0), lambda m: freeze_by_name(m, "*"), lambda m: freeze_layers(m, 4)],
)
def test_freezing_everything_that_trains_is_refused_and_changes_nothing(freeze: Callable[[Any], Any]) -> None:
    model = with_lora(tiny_llama())
    before = trainable(model)
    with pytest.raises(ValueError, match=r"something must be left to train, got all [\d,]+ trainable parameters"):
        freeze(model)
    assert trainable(model) == before
    plain = setup_lp_lora_style(tiny_llama(), 1.0)  # norm and head are left
    assert plain.trainable_params == 100 * 32 + 32


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(NoLayersError, match="must have a stack of layers"):
        setup_lp_lora_style(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="must have embeddings, got TransformerEncoder"):
        freeze_embeddings(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2))


def test_a_pattern_that_matches_nothing_lists_near_misses() -> None:
    with pytest.raises(
        ValueError, match=r"got 'model.layer.0.\*', which matches none; near misses: .*model.layers.0.\*"
    ):
        freeze_by_name(tiny_llama(), ["model.norm.*", "model.layer.0.*"])


def test_a_report_of_another_model_is_refused() -> None:
    report = setup_lp_lora_style(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40)))
    with pytest.raises(ValueError, match=r"report must be of this model, got one with transformer.wte.weight"):
        unfreeze(tiny_llama(), report)
