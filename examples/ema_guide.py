"""The EMA guide from top to bottom: in the Trainer, saved and loaded, in a loop of one's own, the choice of decay.

    python examples/ema_guide.py                                                  # everything embedded
    python examples/ema_guide.py --model gpt2 --dataset my_texts.jsonl --max-steps 3000 --max-length 1024

Whether averaging lowers the loss is another question; see docs/ema.md.
"""

import gc
from dataclasses import dataclass
from math import ceil

import torch
import tyro
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from experiments.harness.data import load_corpus
from experiments.harness.models import EMBEDDED, ensure_embedded
from forge.ema import EMACallback, EMAModel, compute_optimal_decay, initial_weight_share


@dataclass(frozen=True)
class Settings:
    """Train a causal language model twice, with the EMA callback and with a loop of one's own."""

    model: str = "smollm2-135m"
    """Embedded name, local folder or hub id."""
    dataset: str = "moby_dick"
    """Embedded name, local .jsonl, .csv, .parquet or .txt, or hub data set with a text column."""
    output_dir: str = "runs/examples/ema_guide"
    """Where models and the checkpoint go."""
    max_steps: int = 9
    """Optimizer steps of each run, rounded up to three epochs over as few documents as that takes."""
    max_length: int = 64
    """Tokens of a document; what is longer is cut off."""


settings = tyro.cli(Settings)
model_name = str(ensure_embedded(settings.model)) if settings.model in EMBEDDED else settings.model
tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.eos_token
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)  # labels: the tokens, and none for padding


def load_model():
    return AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32, use_cache=False)


def tokenized(split, documents):
    texts = [document.text for document in load_corpus(settings.dataset).split(split)][:documents]
    return Dataset.from_dict(tokenizer(texts, truncation=True, max_length=settings.max_length))


dataset = tokenized("train", 4 * ceil(settings.max_steps / 3))
eval_dataset = tokenized("validation", 8)
steps = 3 * ceil(len(dataset) / 4)
print(f"A demonstration of two runs of {steps} steps on {settings.dataset}, not evidence.")

# =============================================================================
# In the Trainer
# =============================================================================

model = load_model()

# 1. The callback
ema_callback = EMACallback(decay=0.999)

# 2. An ordinary Trainer
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=settings.output_dir,
        num_train_epochs=3,
        per_device_train_batch_size=4,
        save_strategy="no",  # it is saved below
        logging_steps=3,
    ),
    train_dataset=dataset,
    data_collator=collator,  # the guide leaves out where labels come from
    callbacks=[ema_callback],
)

# 3. Training
print("\nWith the callback")
trainer.train()

# 4. The averaged weights into the model
ema_callback.apply_ema(model)

# 5. The model with averaged weights
model.save_pretrained(f"{settings.output_dir}/best_model")
share = initial_weight_share(0.999, steps)
print(f"Saved. After {steps} steps at decay 0.999, {share:.0%} of the average is still the initial weights.")

# =============================================================================
# Saving and loading
# =============================================================================

ema_callback.restore()  # raw weights again: the checkpoint is to hold both

# Save
ema_state = ema_callback.get_ema_state()
torch.save({"model": model.state_dict(), "ema": ema_state}, f"{settings.output_dir}/checkpoint.pt")

# Load; weights_only: no pickled code is run
checkpoint = torch.load(f"{settings.output_dir}/checkpoint.pt", weights_only=True)
model.load_state_dict(checkpoint["model"])
ema_callback.load_ema_state(checkpoint["ema"])
ema_callback.apply_ema(model)
print(f"Checkpoint of step {checkpoint['ema']['step']} saved and loaded.")

# =============================================================================
# In a loop of one's own
# =============================================================================


@torch.no_grad()
def evaluate(model, eval_dataset):
    """Mean loss of a token."""
    model.eval()
    loss_sum, tokens = 0.0, 0
    for batch in DataLoader(eval_dataset, batch_size=4, collate_fn=collator):
        predicted = int((batch["labels"][:, 1:] != -100).sum())
        loss_sum += model(**batch.to(model.device)).loss.item() * predicted
        tokens += predicted
    model.train()
    return loss_sum / tokens


print("\nWith a loop of one's own")
device = model.device
del model, trainer, ema_callback, ema_state, checkpoint
gc.collect()  # a Trainer refers to itself, and its optimizer holds twice the model's bytes
model = load_model().to(device)
model.train()
dataloader = DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=collator)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)

ema = EMAModel(model, decay=0.999)

for epoch in range(3):
    for batch in dataloader:
        # Forward
        outputs = model(**batch.to(device))
        loss = outputs.loss

        # Backward
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        # Update the averages
        ema.update()

    # Evaluate with averaged weights, beside the raw ones
    raw_results = evaluate(model, eval_dataset)
    with ema.use_ema():
        eval_results = evaluate(model, eval_dataset)
        print(f"Epoch {epoch}: held-out loss raw {raw_results:.4f}, EMA {eval_results:.4f}")

# In the end, the averaged weights for good
ema.apply_ema()

# =============================================================================
# The choice of decay
# =============================================================================

decay = compute_optimal_decay(total_steps=10000)
print(f"\nRecommended for 10,000 steps: {decay:.4f}")  # 0.9993
print(f"Recommended for these {steps}: {compute_optimal_decay(total_steps=steps):.4f}")
