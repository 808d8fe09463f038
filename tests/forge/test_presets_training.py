"""QLoRA on real 4-bit weights, and DPO with TRL's trainer."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    set_seed,
)
from trl import DPOTrainer

from forge import get_preset, setup_lp_lora_style
from tests.forge.presets_models import make_examples, make_model
from tests.forge.tensors import names_moved, weights_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

_SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama whose widths are multiples of a block of 64."""
    path = tmp_path_factory.mktemp("llama")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load_4bit(folder: Path, preset: Any) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=preset.get_bnb_config(), device_map="cpu")


def test_bnb_config() -> None:
    config = get_preset("qlora").get_bnb_config()
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert not get_preset("qlora", bnb_4bit_use_double_quant=False).get_bnb_config().bnb_4bit_use_double_quant


def test_qlora_trains_adapters_on_packed_weights(folder: Path, tmp_path: Path) -> None:
    preset = get_preset("qlora", warmup_steps=1, output_dir=str(tmp_path), freeze_ratio=0.5)
    set_seed(0)
    model = preset.prepare(load_4bit(folder, preset))
    assert model.is_gradient_checkpointing
    assert sum(type(m).__name__ == "Linear4bit" for m in model.modules()) == 28  # 14 with and 14 inside a LoRA layer
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in n and "layers.1." in n for n in trainable)
    before = weights_of(model)
    arguments = preset.get_training_args(max_steps=3, report_to=[], save_strategy="no", disable_tqdm=True)
    Trainer(model, arguments, train_dataset=make_examples("llama") * 16).train()
    assert names_moved(before, model) == set(trainable)


def test_gradients_of_qlora_stay_right_after_an_evaluation(folder: Path) -> None:
    """On a CPU, bitsandbytes 0.50 repacks 4-bit weights at the first evaluation unless it is kept from it."""
    gradients = []
    for evaluate_first in (False, True):
        preset = get_preset("qlora", lora_dropout=0.0)
        set_seed(0)
        model = preset.prepare(load_4bit(folder, preset))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        tokens = torch.arange(3, 19)[None]
        if evaluate_first:
            with torch.no_grad():
                model.eval()(input_ids=tokens)
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def narrow_config(hidden_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=120, hidden_size=hidden_size, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )


def narrow_llama(folder: Path, hidden_size: int) -> Path:
    LlamaForCausalLM(narrow_config(hidden_size)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("hidden_size", [64, 96])
def test_rows_that_are_no_whole_blocks_warn_on_a_cpu(tmp_path: Path, hidden_size: int) -> None:
    preset = get_preset("qlora")
    model = load_4bit(narrow_llama(tmp_path, hidden_size), preset)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        preset.prepare(model)
    said = [str(w.message) for w in caught if "whole blocks of 64 on a CPU" in str(w.message)]
    assert len(said) == (hidden_size % 64 > 0)
    assert all("got 96 inputs in" in message for message in said)


def test_a_head_that_the_checkpoint_lacks_is_trained_as_it_was_drawn(tmp_path: Path) -> None:
    LlamaModel(narrow_config(64)).save_pretrained(tmp_path)
    preset = get_preset("qlora")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, quantization_config=preset.get_bnb_config()
    )
    drawn = model.score.weight.detach().clone()
    prepared = preset.prepare(model)
    (head,) = (p for name, p in prepared.named_parameters() if "score.modules_to_save" in name)
    assert drawn.std() > 0 and torch.equal(head, drawn) and head.requires_grad


@pytest.mark.parametrize(
    ("model_class", "config", "head"),
    [
        (RobertaForSequenceClassification, RobertaConfig(intermediate_size=64, **_SMALL), 2),
        (DistilBertForSequenceClassification, DistilBertConfig(hidden_dim=64, **_SMALL), 2),
    ],
    ids=["RoBERTa", "DistilBERT"],
)
def test_every_layer_of_a_head_is_an_ordinary_one(model_class: Any, config: Any, head: int, tmp_path: Path) -> None:
    """RoBERTa's is a module of two, DistilBERT has two modules."""
    model_class(config).save_pretrained(tmp_path)
    preset = get_preset("qlora")
    model = model_class.from_pretrained(tmp_path, quantization_config=preset.get_bnb_config(), device_map="cpu")
    model = preset.prepare(model).train()
    model(input_ids=torch.arange(4, 20)[None], labels=torch.tensor([1])).loss.backward()
    weights = [p for n, p in model.named_parameters() if "modules_to_save" in n and n.endswith("weight")]
    assert len(weights) == head
    assert all(p.is_floating_point() and p.grad is not None for p in weights)


def test_the_flow_of_seed_001(folder: Path, tmp_path: Path) -> None:
    preset = get_preset("qlora", lora_r=32, lora_alpha=64, learning_rate=2e-4, num_train_epochs=3)
    model = load_4bit(folder, preset)
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, preset.get_lora_config())
    setup_lp_lora_style(model, freeze_ratio=0.5)
    before = weights_of(model)
    training_args = preset.get_training_args()
    training_args.output_dir = str(tmp_path)
    trainer = Trainer(model=model, args=training_args, train_dataset=make_examples("llama"))
    trainer.train()
    assert trainer.state.epoch == 3
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert {p.shape[0] for name, p in adapters.items() if "lora_A" in name} == {32}
    assert names_moved(before, model) == {name for name in adapters if "layers.1." in name}


def test_a_quantised_model_is_refused_where_weights_train(folder: Path) -> None:
    model = load_4bit(folder, get_preset("qlora"))
    with pytest.raises(
        ValueError, match="'sft' trains the weights, which must not be quantised, got a quantised Llama"
    ):
        get_preset("sft").prepare(model)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_dpo_learns_the_preference(tmp_path: Path) -> None:
    """TRL's trainer with a frozen copy as reference: the margin of the chosen answers grows from 0."""
    pairs = Dataset.from_list(
        [{"prompt": f"w{i} w{i + 1} ", "chosen": "w30 w31 w32", "rejected": "w35 w36"} for i in range(16)]
    )
    preset = get_preset(
        "dpo",
        beta=0.2,
        learning_rate=1e-3,
        warmup_steps=0,
        gradient_accumulation_steps=1,
        offload="activations",
        gradient_checkpointing=True,
        output_dir=str(tmp_path),
    )
    model = preset.prepare(make_model("llama"))
    reference = copy.deepcopy(make_model("llama"))
    arguments = preset.get_training_args(
        max_steps=8, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True
    )
    trainer = DPOTrainer(model, reference, args=arguments, train_dataset=pairs, processing_class=word_tokenizer())
    assert trainer.beta == 0.2
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[-1] > 0.1


def test_dpo_on_lora_needs_no_reference(tmp_path: Path) -> None:
    pairs = Dataset.from_list([{"prompt": "w1 ", "chosen": "w30 w31", "rejected": "w35"}] * 8)
    model = get_preset("lora").prepare(make_model("llama"))
    before = weights_of(model)
    arguments = get_preset("dpo", learning_rate=1e-5, gradient_accumulation_steps=1, warmup_steps=0).get_training_args(
        output_dir=str(tmp_path), max_steps=2, save_strategy="no", report_to=[], disable_tqdm=True
    )
    DPOTrainer(model, args=arguments, train_dataset=pairs, processing_class=word_tokenizer()).train()
    moved = names_moved(before, model)
    assert moved and all("lora_" in n for n in moved)
