"""The methods of fine-tuning that are compared: each a preset, its own size, and what proves that it took effect."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.harness.classification import ClassificationRun
from experiments.harness.record import ManipulationCheck
from experiments.harness.tasks import Run, collator_of

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers.trainer_callback import TrainerCallback

    from experiments.harness import causal_lm, classification
    from forge.presets import Preset

    Ingredients = causal_lm.Ingredients | classification.Ingredients


@dataclass(frozen=True)
class Method:
    """A way to fine-tune, with one size of its own."""

    preset: str
    size: str | None = None
    """The preset's option that is its size; None: all weights train."""
    sizes: tuple[int, ...] = ()
    """Levels of the size; the middle one is used where nothing is tuned."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the preset."""
    starts_at_base: bool = True
    """Whether the untrained method is the base model."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the run in which this method's recipe differs from the others'."""

    @property
    def middle_size(self) -> int | None:
        """The size where nothing is tuned; None where there is none."""
        return self.sizes[len(self.sizes) // 2] if self.sizes else None


_RANKS, _WIDTHS, _TOKENS = (8, 16, 32), (16, 32, 64), (5, 10, 20)
_ON_NF4 = {"target_modules": "attention", "lora_dropout": 0.0, "gradient_checkpointing": False}
"""QLoRA as LoRA on attention: only the stored weights differ."""

METHODS = {
    "sft": Method("sft"),
    "classic": Method("classic", recipe={"precision": "fp32", "weight_decay": 0.01}),
    "lora": Method("lora", "lora_r", _RANKS),
    "lora-all-linear": Method("lora-all-linear", "lora_r", _RANKS),
    "qlora": Method("qlora", "lora_r", _RANKS, _ON_NF4),
    "adalora": Method("adalora", "target_r", _RANKS),
    "weightlora": Method("weightlora", "lora_r", _RANKS),
    "houlsby": Method("houlsby", "bottleneck", _WIDTHS),
    "prefix-tuning": Method("prefix-tuning", "num_virtual_tokens", _TOKENS, starts_at_base=False),
    "p-tuning": Method("p-tuning", "num_virtual_tokens", _TOKENS, starts_at_base=False),
    "p-tuning-v2": Method("p-tuning-v2", "num_virtual_tokens", _TOKENS, starts_at_base=False),
    "prompt-tuning": Method("prompt-tuning", "num_virtual_tokens", _TOKENS, starts_at_base=False),
}
"""By name, which is that of the preset."""

_AT_THE_INPUT = ("p-tuning", "prompt-tuning")


def preset_of(name: str, size: int | None, steps: int) -> Preset:
    """The preset of a method at a size: α = 2r; AdaLoRA begins with ranks half as large again as its budget.

    Args:
        name: of the method.
        size: its own size; None for methods without one.
        steps: optimizer steps of the run, which AdaLoRA's schedule needs.
    """
    from forge.presets import get_preset

    method = METHODS[name]
    options: dict[str, Any] = dict(method.options)
    if method.size is not None and size is not None:
        options[method.size] = size
        if method.sizes is _RANKS:
            options["lora_alpha"] = 2 * size
        if name == "adalora":
            options |= {"init_r": size + size // 2, "total_step": steps, "deltaT": max(1, steps // 20)}
    return get_preset(method.preset, **options)


def build(run: Run, ingredients: Ingredients, seed: int, preset: Preset | None) -> Any:
    """The model anew for data that are at hand: seeded and built as by ``tasks.prepare``, on the device of training."""
    import torch
    from transformers import set_seed

    from experiments.harness.models import load_causal_lm, load_classifier

    base: Any = ingredients.model
    set_seed(seed)
    model: Any
    if isinstance(run, ClassificationRun):
        model = load_classifier(run.model, base.config.num_labels, random_init=run.random_init, preset=preset)
        model.config.pad_token_id = base.config.pad_token_id
    else:
        model = load_causal_lm(run.model, random_init=run.random_init, preset=preset)
        if preset is not None and preset.name in _AT_THE_INPUT:
            model.register_forward_hook(_logits_of_the_text, with_kwargs=True)
    return model.to("cuda") if torch.cuda.is_available() else model


def _logits_of_the_text(_: nn.Module, __: Any, inputs: dict[str, Any], output: Any) -> None:
    """Leave out the logits of learned positions, which PEFT puts before those of the text."""
    output["logits"] = output["logits"][:, -inputs["input_ids"].shape[1] :]


def callbacks_of(preset: Preset, model: nn.Module, steps: int) -> list[TrainerCallback]:
    """The preset's own; WeightLoRA keeps half of its adapters after a third of the run."""
    from forge.adapters import WeightLoraCallback

    if preset.name != "weightlora":
        return preset.callbacks()
    return [WeightLoraCallback(max(1, steps // 3), top_k=_kept_adapters(model))]


def _kept_adapters(model: nn.Module) -> int:
    from forge.adapters.tuner import tuner_layers
    from forge.adapters.weight_lora import WeightLoraLinear

    return len(tuner_layers(model, WeightLoraLinear)) // 2


def base_linears(base: Any) -> dict[str, tuple[int, int]]:
    """(input width, output width) of every linear map of a plain model but those of its head, by name."""
    from forge.adapters.placement import linear_shape

    shapes = {name: linear_shape(module) for name, module in base.named_modules()}
    inside = f"{base.base_model_prefix}."
    return {name: shape for name, shape in shapes.items() if shape is not None and name.startswith(inside)}


def expected_trainable(base: Any, preset: Preset) -> int:
    """Trainable parameters of a method by its closed form, from the shapes of the plain model.

    A classification head trains beside every adapter. Sources: arXiv:2106.09685 §4.1 (r (in + out) a map; AdaLoRA adds
    r singular values, WeightLoRA one weight), arXiv:1902.00751 §2.1 (2md + d + m), arXiv:2101.00190 §4.
    """
    from forge.adapters.placement import find_sublayer_outputs
    from forge.presets.adapters import task_type_of
    from forge.targets import resolve_target_modules

    options: Any = preset
    if preset.name in ("sft", "classic"):
        return sum(int(p.numel()) for p in base.parameters())
    body = {id(p) for p in base.base_model.parameters()}
    head = sum(p.numel() for p in base.parameters() if id(p) not in body) if task_type_of(base) == "SEQ_CLS" else 0
    shapes = base_linears(base)
    if preset.name == "houlsby":
        m, widths = options.bottleneck, [shapes[name][1] for name in find_sublayer_outputs(base)]
        return int(head + sum(2 * m * d + d + m for d in widths))
    if "virtual" in (METHODS[preset.name].size or ""):
        return head + _prompt_params(base.config, options)
    rank = options.init_r if preset.name == "adalora" else options.lora_r
    extra = {"adalora": rank, "weightlora": 1}.get(preset.name, 0)
    targets = resolve_target_modules(base, options.target_modules)
    adapted = shapes if isinstance(targets, str) else {n: s for n, s in shapes.items() if n.endswith(tuple(targets))}
    return head + sum(rank * (d_in + d_out) + extra for d_in, d_out in adapted.values())


def _prompt_params(config: Any, preset: Any) -> int:
    tokens, width, heads = preset.num_virtual_tokens, config.hidden_size, config.num_attention_heads
    kv_width = width // heads * (getattr(config, "num_key_value_heads", None) or heads)
    prefix = 2 * config.num_hidden_layers * kv_width
    if preset.name == "prompt-tuning":
        return int(tokens * width)
    if preset.name == "p-tuning-v2":
        return int(tokens * prefix)
    inner = preset.encoder_hidden_size
    if preset.name == "prefix-tuning":
        return int(tokens * kv_width + (kv_width + 1) * inner + (inner + 1) * prefix)
    return int(tokens * width + (width + 1) * inner + (inner + 1) * inner + (inner + 1) * width)


def checks_before(run: Run, ingredients: Ingredients, model: Any, preset: Preset) -> list[ManipulationCheck]:
    """Proof that the method is what it says it is, before training.

    Its number of trainable parameters, 4-bit weights only under QLoRA, and, for what is added to the model, that it
    starts at the base model's function bitwise where it should, and changes it from the start where it should.
    """
    quantised = sum(type(p).__name__ == "Params4bit" for p in model.parameters())
    checks = ManipulationCheck.each(
        trainable_params=(
            expected_trainable(ingredients.model, preset),
            sum(p.numel() for p in model.parameters() if p.requires_grad),
        ),
        nf4_modules=(len(base_linears(ingredients.model)) if preset.name == "qlora" else 0, quantised),
    )
    if METHODS[preset.name].size is not None:
        starts = METHODS[preset.name].starts_at_base
        checks += ManipulationCheck.each(starts_at_the_base_model=(starts, _starts_at_base(run, ingredients, model)))
    return checks


def _starts_at_base(run: Run, ingredients: Ingredients, model: Any) -> bool:
    import torch
    from transformers import default_data_collator

    rows = [ingredients.validation[i] for i in range(min(run.batch_size, len(ingredients.validation)))]
    batch = (collator_of(ingredients) or default_data_collator)(rows)
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    model.eval()
    with torch.no_grad():
        adapted: torch.Tensor = model(**inputs).logits
        # PEFT 0.21 cannot disable prompts of a classifier; the model inside has none.
        prompts = model.active_peft_config.is_prompt_learning
        with nullcontext() if prompts else model.disable_adapter():
            plain: torch.Tensor = (model.get_base_model() if prompts else model)(**inputs).logits
    model.train()
    return torch.equal(adapted, plain)


def checks_after(model: Any, preset: Preset, callbacks: list[TrainerCallback]) -> list[ManipulationCheck]:
    """Proof that AdaLoRA has allocated its ranks within the budget, and that WeightLoRA has kept its K adapters."""
    from forge.adapters.pruning import unpruned

    if preset.name == "weightlora":
        return ManipulationCheck.each(adapters_kept=(_kept_adapters(model), len(unpruned(model))))
    if preset.name != "adalora":
        return []
    ranks = ranks_of(callbacks)
    budget = rank_budget(preset, ranks)
    return ManipulationCheck.each(
        ranks_differ=(True, len(set(ranks.values())) > 1), ranks_within_budget=(True, sum(ranks.values()) <= budget)
    )


def ranks_of(callbacks: list[TrainerCallback]) -> dict[str, int]:
    """AdaLoRA's rank of every adapted module."""
    from forge.adapters import AdaLoraCallback

    (callback,) = (c for c in callbacks if isinstance(c, AdaLoraCallback))
    return callback.ranks


def rank_budget(preset: Any, ranks: Mapping[str, int]) -> int:
    """Sum of all ranks at the end (arXiv:2303.10512 §3.3: the final budget)."""
    return int(preset.target_r * len(ranks))


def saved_bytes(model: Any, folder: Path) -> int:
    """Size of the files of weights that ``save_pretrained`` writes."""
    model.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
