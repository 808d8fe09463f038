"""Closed-form memory against what torch allocates (section «Memory Estimation» of THEORY.md)."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

from forge.memory import (
    activation_bytes,
    buffer_bytes,
    estimate_model_memory,
    optimizer_state_bytes,
    parameter_storage,
)
from forge.memory.optimizers import embedding_parameters

BATCH, TOKENS = 2, 128
FACTOR = 1.2
"""Activations are within this factor of the real peak, both ways."""
CHECKPOINTED_FACTOR = 1.35
"""The same for their sum with the gradients under checkpointing."""


def llama(*, attention: str = "sdpa", vocabulary: int = 300, **options: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 352}
    options = sizes | {"num_key_value_heads": 2, "use_cache": False} | options
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, attn_implementation=attention, **options))


def gpt2(*, dropout: float = 0.0, attention: str = "sdpa") -> GPT2LMHeadModel:
    drops = {"attn_pdrop": dropout, "resid_pdrop": dropout, "embd_pdrop": dropout}
    sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 300}
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, attn_implementation=attention, use_cache=False))


def bert(*, dropout: float = 0.0, attention: str = "sdpa") -> BertForMaskedLM:
    drops = {"attention_probs_dropout_prob": dropout, "hidden_dropout_prob": dropout}
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    return BertForMaskedLM(BertConfig(**sizes, **drops, vocab_size=300, attn_implementation=attention))


def t5(*, dropout: float = 0.0, attention: str = "sdpa") -> T5ForConditionalGeneration:
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_heads": 4, "vocab_size": 300}
    config = T5Config(**sizes, dropout_rate=dropout, attn_implementation=attention, use_cache=False)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return model


def lora(model: Any, targets: Any = ("q_proj", "v_proj"), dropout: float = 0.0) -> Any:
    targets = targets if isinstance(targets, str) else list(targets)
    return get_peft_model(model, LoraConfig(r=8, target_modules=targets, lora_dropout=dropout))


def upper_half(model: LlamaForCausalLM) -> LlamaForCausalLM:
    model.model.embed_tokens.requires_grad_(False)
    for layer in model.model.layers[:2]:
        layer.requires_grad_(False)
    return model


def batch_for(model: nn.Module, vocabulary: int = 300) -> dict[str, Tensor]:
    rows = torch.randint(0, vocabulary, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": rows, "labels": rows}


def measured_peak(model: nn.Module, autocast: torch.dtype | None) -> int:
    """Highest sum of allocations over one forward and backward pass, gradients included."""

    def step() -> None:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(**batch_for(model)).loss
        loss.backward()

    step()
    model.zero_grad()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


# Activations ----------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Callable[[], nn.Module], torch.dtype | None]] = {
    "llama": (llama, None),
    "llama, middle size": (lambda: llama(hidden_size=384, intermediate_size=1024, num_hidden_layers=8), None),
    "llama, eager attention": (lambda: llama(attention="eager"), None),
    "llama, large vocabulary": (lambda: llama(vocabulary=8000), None),
    "llama, bf16": (lambda: llama().bfloat16(), None),
    "llama, autocast": (llama, torch.bfloat16),
    "llama, upper half": (lambda: upper_half(llama()), None),
    "llama, LoRA": (lambda: lora(llama()), None),
    "llama bf16, LoRA fp32, all linear, dropout": (lambda: lora(llama().bfloat16(), "all-linear", 0.1), None),
    "llama, LoRA, autocast": (lambda: lora(llama()), torch.bfloat16),
    "gpt2": (gpt2, None),
    "gpt2, dropout": (lambda: gpt2(dropout=0.1), None),
    "gpt2, eager attention": (lambda: gpt2(attention="eager"), None),
    "bert": (bert, None),
    "bert, dropout": (lambda: bert(dropout=0.1), None),
    "bert, autocast": (bert, torch.bfloat16),
    "t5": (t5, None),
    "t5, dropout": (lambda: t5(dropout=0.1), None),
}


@pytest.mark.parametrize("case", CASES)
def test_activations_are_near_the_real_peak(case: str) -> None:
    """Without checkpointing the peak comes at the start of the backward pass, before there are gradients."""
    torch.manual_seed(0)
    build, autocast = CASES[case]
    model = build().train()
    estimate = activation_bytes(model, BATCH, TOKENS, gradient_checkpointing=False, autocast_dtype=autocast)
    assert 1 / FACTOR < estimate / measured_peak(model, autocast) < FACTOR


@pytest.mark.parametrize("build", [llama, lambda: lora(llama()), gpt2, bert], ids=["llama", "lora", "gpt2", "bert"])
def test_activations_under_checkpointing(build: Callable[[], Any]) -> None:
    """The peak comes late, in the recomputation of a layer, where most gradients are there already."""
    torch.manual_seed(0)
    plain = activation_bytes(build(), BATCH, TOKENS, gradient_checkpointing=False)
    model = checkpointed(build()).train()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    estimate = activation_bytes(model, BATCH, TOKENS, gradient_checkpointing=True)
    peak = measured_peak(model, None)
    assert estimate < 0.7 * plain
    assert peak / CHECKPOINTED_FACTOR < estimate + gradients < peak * CHECKPOINTED_FACTOR


def test_activations_of_one_layer_by_hand() -> None:
    """Eq. 1 of arXiv:2205.05198 for this block: fused attention, no dropout, fp32, weights that train."""
    h, f, v, positions = 128, 512, 300, BATCH * TOKENS
    layer = 4 * (3 * h + h + 2 * 2 * h + 2 * f) + 4 * 4  # q k v, attention's output, 2 norms in and out, MLP; log-sums
    expected = positions * (4 * layer + 12 * v)
    assert activation_bytes(bert(), BATCH, TOKENS, gradient_checkpointing=False) == expected
    recomputed = positions * (4 * 4 * h + max(12 * v, int(1.5 * layer)))
    assert activation_bytes(bert(), BATCH, TOKENS, gradient_checkpointing=True) == recomputed
    eager = bert(attention="eager")
    scores = positions * 4 * (4 * TOKENS * 4 - 4 * 4)  # layers x (heads x tokens x fp32 − log-sums)
    assert activation_bytes(eager, BATCH, TOKENS, gradient_checkpointing=False) == expected + scores


def test_frozen_lower_layers_store_nothing_unless_their_input_must_have_a_gradient() -> None:
    def activations(model: nn.Module) -> int:
        return activation_bytes(model, BATCH, TOKENS, gradient_checkpointing=False)

    whole, half = activations(llama()), activations(upper_half(llama()))
    head = BATCH * TOKENS * 300 * 12
    assert half - head == (whole - head) / 2
    required = upper_half(llama())
    required.enable_input_require_grads()
    assert activations(required) > half
    nothing = llama().requires_grad_(False)
    assert activations(nothing) < half


def test_activations_are_linear_in_the_batch() -> None:
    one, four = (activation_bytes(llama(), b, TOKENS, gradient_checkpointing=False) for b in (1, 4))
    assert four == 4 * one


# Parameters, gradients, optimizer -------------------------------------------------------------------------------------


def distinct_bytes(tensors: Any) -> int:
    return sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_by_hand_with_tied_weights_once(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied).bfloat16()
    h, f, v = 128, 352, 300
    elements = 4 * (h * h * 2 + h * h + 3 * h * f + 2 * h) + h + v * h * (1 if tied else 2)
    assert sum(p.numel for p in parameter_storage(model)) == elements
    assert sum(p.stored_bytes for p in parameter_storage(model)) == 2 * elements
    memory = estimate_model_memory(model, 1, 8)
    assert memory["parameters_gb"] * 1e9 == pytest.approx(2 * elements + buffer_bytes(model), abs=0.1)
    assert memory["gradients_gb"] * 1e9 == pytest.approx(2 * elements, abs=0.1)


OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]
BNB_OPTIMIZERS = ["adamw_8bit", "lion_8bit", "lion_32bit", "rmsprop_bnb_8bit", "paged_adamw_32bit"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_and_optimizer_state_are_exact(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """After one step with the Trainer's own optimizer, for a model of which a part is frozen."""
    model = upper_half(llama(tie_word_embeddings=False)).to(dtype)
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to=[])
    optimizer = Trainer(model=model, args=arguments).create_optimizer()
    model(**batch_for(model)).loss.backward()
    optimizer.step()
    memory = estimate_model_memory(model, 1, 8, optimizer=name)
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    state = [v for held in optimizer.state.values() for v in held.values() if isinstance(v, Tensor)]
    assert round(memory["gradients_gb"] * 1e9) == gradients
    assert round(memory["optimizer_gb"] * 1e9) == sum(v.numel() * v.element_size() for v in state)


@pytest.mark.parametrize("name", BNB_OPTIMIZERS)
def test_state_of_bitsandbytes_is_exact(name: str, tmp_path: Path) -> None:
    """State as bitsandbytes sets it up: embeddings in fp32, small tensors in fp32, code books shared."""
    model = llama(tie_word_embeddings=False)
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to=[])
    optimizer = Trainer(model=model, args=arguments).create_optimizer()
    optimizer.get_state_buffer = lambda p, dtype: torch.zeros_like(p, dtype=dtype)  # paging needs a GPU
    optimizer.check_overrides()
    for group_index, group in enumerate(optimizer.param_groups):
        for index, p in enumerate(group["params"]):
            optimizer.init_state(group, p, group_index, index)
    state = [v for held in optimizer.state.values() for v in held.values() if isinstance(v, Tensor)]
    expected = optimizer_state_bytes(model.parameters(), name, embeddings=embedding_parameters(model))
    assert expected == distinct_bytes(state)


def test_momentum_of_sgd() -> None:
    layer = nn.Linear(8, 4)
    layer(torch.ones(1, 8)).sum().backward()
    optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9)
    optimizer.step()
    held = [s["momentum_buffer"] for s in optimizer.state.values()]
    assert optimizer_state_bytes(layer.parameters(), "sgd_momentum") == distinct_bytes(held) == 36 * 4


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("double", [False, True])
def test_four_bit_weights_by_real_bytes_and_number(saved: Path, double: bool) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    model = LlamaForCausalLM.from_pretrained(saved, quantization_config=config)
    storage = {p.name: p for p in parameter_storage(model)}
    packed = storage["model.layers.0.mlp.up_proj.weight"]
    elements, blocks = 128 * 352, 128 * 352 // 64
    maxima = (
        blocks + 4 * -(-blocks // 256) + 256 * 4 + 4 if double else 4 * blocks
    )  # state2's maxima, code book, offset
    assert packed.numel == elements and packed.dtype == "nf4"
    assert packed.stored_bytes == elements // 2 + maxima + 16 * 4
    assert sum(p.numel for p in storage.values()) == sum(p.numel() for p in llama().parameters())


def test_eight_bit_weights_keep_their_bytes_through_a_forward_pass(saved: Path) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = LlamaForCausalLM.from_pretrained(saved, quantization_config=config)

    def total() -> int:
        return sum(p.stored_bytes for p in parameter_storage(model)) + buffer_bytes(model)

    before = total()
    packed = {p.name: p for p in parameter_storage(model)}["model.layers.0.mlp.up_proj.weight"]
    assert (packed.numel, packed.dtype, packed.stored_bytes) == (128 * 352, "int8", 128 * 352 + 4 * 352)
    model(torch.zeros(1, 4, dtype=torch.long))
    assert total() == before


# estimate_model_memory ------------------------------------------------------------------------------------------------


def test_estimate_has_the_keys_of_the_guide_and_adds_up() -> None:
    memory = estimate_model_memory(llama(), batch_size=4, sequence_length=256)
    *parts, total = memory
    assert parts == ["parameters_gb", "gradients_gb", "optimizer_gb", "activations_gb"]
    assert total == "total_estimated_gb"
    assert memory[total] == pytest.approx(sum(memory[part] for part in parts))


def test_checkpointing_is_read_from_the_model() -> None:
    plain, other = estimate_model_memory(llama(), 2, 128), estimate_model_memory(checkpointed(llama()), 2, 128)
    assert other == estimate_model_memory(llama(), 2, 128, gradient_checkpointing=True)
    assert plain == estimate_model_memory(checkpointed(llama()), 2, 128, gradient_checkpointing=False)
    assert other["activations_gb"] < plain["activations_gb"]


def test_lora_pays_for_its_own_parameters_only() -> None:
    model = lora(llama())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = estimate_model_memory(model, 2, 128)
    assert round(memory["gradients_gb"] * 1e9) == 4 * trainable
    tensors = sum(p.requires_grad for p in model.parameters())
    assert round(memory["optimizer_gb"] * 1e9) == 8 * trainable + 4 * tensors


def test_a_model_on_meta_needs_no_memory_to_be_estimated() -> None:
    with torch.device("meta"):
        model = llama()
    on_cpu = estimate_model_memory(llama(), 2, 128)
    assert estimate_model_memory(model, 2, 128) == on_cpu


def test_more_tokens_than_positions_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate_model_memory(llama(), 1, 2048)
    with pytest.warns(UserWarning, match="at most the model's 2048 positions, got 2049"):
        estimate_model_memory(llama(), 1, 2049)


def vit() -> nn.Module:
    return ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64))


def mixtral() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, intermediate_size=64, vocab_size=100, num_local_experts=2))


def albert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    return AlbertModel(AlbertConfig(**sizes, embedding_size=16, vocab_size=100))


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (llama, {"batch_size": 0}, ValueError, "batch_size must be a whole number of at least 1, got 0"),
        (llama, {"sequence_length": True}, ValueError, "sequence_length must be a whole number of at least 1, got"),
        (llama, {"optimizer": "adamw_tourch"}, ValueError, "got 'adamw_tourch'; did you mean adamw_torch"),
        (llama, {"optimizer": "lomo"}, ValueError, "got 'lomo'; known are adamw_torch"),
        (llama, {"autocast_dtype": torch.float32}, ValueError, "torch.bfloat16, torch.float16 or None"),
        (lambda: {}, {}, TypeError, r"model must be an nn\.Module, got dict"),
        (lambda: nn.Linear(2, 2), {}, ValueError, "need the config of a text model, got Linear"),
        (vit, {}, ValueError, "got ViTModel whose config lacks vocab_size"),
        (mixtral, {}, ValueError, r"got experts in model\.layers\.0"),
        (albert, {}, ValueError, "layers with weights of their own, got 1 for 4 passes"),
    ],
)
def test_bad_input_says_rule_value_and_fix(
    build: Callable[[], Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        estimate_model_memory(build(), **({"batch_size": 1, "sequence_length": 8} | options))
