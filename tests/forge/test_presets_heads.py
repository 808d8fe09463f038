"""Task heads: new weights train whole beside every kind of adapter, whatever the head is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForMultipleChoice,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    SiglipConfig,
    SiglipForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from forge import get_preset
from forge.presets.heads import task_head
from tests.forge.presets_models import make_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

_BERT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_IMAGES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_IMAGES |= {"image_size": 8, "patch_size": 4}
_BART = {"vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
_BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
_DISTIL = {"vocab_size": 60, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}


def whisper() -> Any:
    sizes = _BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **special))


TOKENS = torch.tensor([[5, 6, 7, 2], [8, 9, 4, 2]])
TEXT = {"input_ids": TOKENS, "labels": torch.tensor([0, 1])}
PIXELS = {"pixel_values": torch.ones(2, 3, 8, 8), "labels": torch.tensor([0, 1])}

HEADS: dict[str, tuple[Callable[[], Any], dict[str, torch.Tensor], list[str]]] = {
    "ViT": (lambda: ViTForImageClassification(ViTConfig(**_IMAGES)), PIXELS, ["classifier"]),
    "SigLIP, which has no base_model": (
        lambda: SiglipForImageClassification(SiglipConfig(vision_config=_IMAGES, text_config=_BERT)),
        PIXELS,
        ["classifier"],
    ),
    "BERT, multiple choice": (
        lambda: BertForMultipleChoice(BertConfig(**_BERT)),
        {"input_ids": TOKENS[None].repeat(2, 1, 1), "labels": torch.tensor([0, 1])},
        ["classifier"],
    ),
    "BERT, tokens": (
        lambda: BertForTokenClassification(BertConfig(**_BERT)),
        {"input_ids": TOKENS, "labels": torch.ones_like(TOKENS)},
        ["classifier"],
    ),
    "BART": (lambda: BartForSequenceClassification(BartConfig(**_BART)), TEXT, ["classification_head"]),
    "DistilBERT": (
        lambda: DistilBertForSequenceClassification(DistilBertConfig(**_DISTIL)),
        TEXT,
        ["pre_classifier", "classifier"],
    ),
}
"""Model → what makes it, a batch, its head."""


@pytest.mark.parametrize("name", ["lora", "lora-all-linear"])
@pytest.mark.parametrize("case", HEADS)
def test_a_new_head_trains_whole_and_is_not_adapted(case: str, name: str) -> None:
    build, batch, head = HEADS[case]
    base = build()
    assert task_head(base) == head
    size = sum(p.numel() for part in head for p in base.get_submodule(part).parameters())
    model = get_preset(name).prepare(base).train()
    model(**batch).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert sum(p.numel() for p in trained.values()) == size
    assert all(p.grad is not None for p in trained.values())
    assert not any("lora_" in n and part in n for n, _ in model.named_parameters() for part in head)


@pytest.mark.parametrize("name", ["weightlora", "houlsby", "prompt-tuning", "prefix-tuning"])
def test_it_trains_beside_every_kind_of_adapter(name: str) -> None:
    model = get_preset(name).prepare(BartForSequenceClassification(BartConfig(**_BART)))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sum("classification_head.modules_to_save" in n for n in trainable) == 4


def test_a_target_that_lies_in_a_head_by_chance_leaves_it_whole() -> None:
    model = get_preset("lora", target_modules=["q_proj", "dense"]).prepare(
        BartForSequenceClassification(BartConfig(**_BART))
    )
    trainable = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert sum("classification_head.modules_to_save" in n for n in trainable) == len(trainable) == 4
    assert not any("classification_head" in n and "lora_" in n for n, _ in model.named_modules())


def test_what_the_targets_name_is_adapted_instead() -> None:
    model = get_preset("lora", target_modules=["query", "classifier"]).prepare(
        BertForMultipleChoice(BertConfig(**_BERT))
    )
    assert not any("modules_to_save" in n for n, _ in model.named_modules())
    assert any("classifier.lora_A" in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "bart"])
def test_the_head_of_a_language_model_is_no_task_head(family: str) -> None:
    assert task_head(make_model(family)) == []


def test_a_bare_body_has_no_head() -> None:
    assert task_head(BertModel(BertConfig(**_BERT))) == task_head(nn.Linear(2, 2)) == []


def test_a_head_whose_name_others_have_too_is_refused() -> None:
    """PEFT would copy and train ``bert.encoder.layer.0.output`` with it."""
    model = make_model("bert-classifier")
    model.output = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"head must end no other module's name, got \['classifier', 'output'\].*'sft'"
    ):
        get_preset("lora").prepare(model)


@pytest.mark.parametrize("name", ["lora", "houlsby"])
def test_adapters_on_a_model_of_sound(name: str) -> None:
    """PEFT's class for the task SEQ_2_SEQ_LM would call it with ``input_ids``."""
    model = get_preset(name).prepare(whisper()).train()
    model(input_features=torch.ones(2, 8, 32), labels=torch.full((2, 4), 5)).loss.backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable and all(p.grad is not None for p in trainable)
    assert task_head(model.get_base_model()) == []
