"""The full guide: QLoRA by preset, the lower half frozen, averaged weights, gradients watched, the adapter saved.

    python examples/train_with_forge.py                                                      # everything embedded
    python examples/train_with_forge.py --model mistralai/Mistral-7B-v0.1 --dataset my_texts.jsonl --max-steps -1 \\
        --max-length 2048
"""

from dataclasses import dataclass

import tyro
from datasets import Dataset, DatasetDict
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer

from experiments.harness.data import load_corpus
from experiments.harness.models import EMBEDDED, ensure_embedded
from forge import MonitorCallback, get_preset, print_model_info, setup_lp_lora_style
from forge.ema import EMACallback, initial_weight_share


@dataclass(frozen=True)
class Settings:
    """Train a QLoRA adapter in the upper half of a causal language model."""

    model: str = "smollm2-135m"
    """Embedded name, local folder or hub id."""
    dataset: str = "moby_dick"
    """Embedded name, local .jsonl, .csv, .parquet or .txt, or hub data set with a text column."""
    output_dir: str = "runs/examples/train_with_forge"
    """Where checkpoints and the final adapter go."""
    max_steps: int = 4
    """Optimizer steps of 16 documents; -1: three epochs."""
    max_length: int = 64
    """Tokens of a document: longer ones are cut, shorter ones padded. The guide has 2048."""


# =============================================================================
# Configuration
# =============================================================================

settings = tyro.cli(Settings)
MODEL_NAME = str(ensure_embedded(settings.model)) if settings.model in EMBEDDED else settings.model
DATASET_NAME = settings.dataset
OUTPUT_DIR = settings.output_dir

length = "three epochs" if settings.max_steps == -1 else f"{settings.max_steps} steps"
print(f"A demonstration of {length} on {DATASET_NAME}, not evidence.\n")

# =============================================================================
# 1. The preset
# =============================================================================

preset = get_preset("qlora", lora_r=32, lora_alpha=64, learning_rate=2e-4, num_train_epochs=3)

print("📦 Preset configuration:")
preset.print_info()

# =============================================================================
# 2. The model
# =============================================================================

print(f"\n📥 Loading model: {MODEL_NAME}")

tokenizer = AutoTokenizer.from_pretrained(MODEL_NAME)
tokenizer.pad_token = tokenizer.eos_token

model = AutoModelForCausalLM.from_pretrained(MODEL_NAME, quantization_config=preset.get_bnb_config(), device_map="auto")

# =============================================================================
# 3. Preparation (one call does all of it: get_preset("qlora", freeze_ratio=0.5).prepare(model))
# =============================================================================

print("\n🔧 Preparing model...")

model = prepare_model_for_kbit_training(model)
model = get_peft_model(model, preset.get_lora_config())
# On a CPU, bitsandbytes 0.50 repacks the weights in evaluation for a kernel that has no backward pass.
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False

# LP-LoRA style: the lower half of the layers frozen
setup_lp_lora_style(model, freeze_ratio=0.5)

print_model_info(model)

# =============================================================================
# 4. The data
# =============================================================================

print(f"\n📚 Loading dataset: {DATASET_NAME}")

corpus = load_corpus(DATASET_NAME)
dataset = DatasetDict(
    {split: Dataset.from_dict({"text": [d.text for d in corpus.split(split)]}) for split in ("train", "validation")}
)


def tokenize(example):
    return tokenizer(example["text"], truncation=True, max_length=settings.max_length, padding="max_length")


dataset = dataset.map(tokenize, batched=True)

# =============================================================================
# 5. Callbacks
# =============================================================================

ema_callback = EMACallback(decay=0.999)
monitor_callback = MonitorCallback(check_gradients=True)

# =============================================================================
# 6. Trainer
# =============================================================================

training_args = preset.get_training_args()
training_args.output_dir = OUTPUT_DIR
training_args.max_steps = settings.max_steps
training_args.logging_steps = 1

trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=dataset["train"],
    eval_dataset=dataset.get("validation"),
    processing_class=tokenizer,  # the guide's tokenizer=, which transformers 5 has no more
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),  # labels, and none for padding
    callbacks=[ema_callback, monitor_callback],
)

# =============================================================================
# 7. Training
# =============================================================================

print("\n🚀 Starting training...")
trainer.train()

# =============================================================================
# 8. Saving
# =============================================================================

print("\n💾 Saving model with EMA weights...")

# Averaged weights: of the adapter, for nothing else is trained. Whether they are better: docs/ema.md
ema_callback.apply_ema(model)
share = initial_weight_share(0.999, trainer.state.global_step)
print(f"(After {trainer.state.global_step} steps at decay 0.999, {share:.0%} of them is the untrained adapter.)")

model.save_pretrained(f"{OUTPUT_DIR}/final_model")
tokenizer.save_pretrained(f"{OUTPUT_DIR}/final_model")

print(f"\n✅ Done! Model saved to {OUTPUT_DIR}/final_model")
