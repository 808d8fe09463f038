"""Classic fine-tuning: every weight trained, in fp32, and the loss before it beside the loss after it.

python examples/classic_finetuning.py                                              # everything embedded
python examples/classic_finetuning.py --model gpt2 --dataset my_texts.jsonl --max-steps 1000 --max-length 1024
"""

from dataclasses import dataclass
from math import exp

import torch
import tyro
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from experiments.harness.data import load_corpus
from experiments.harness.models import EMBEDDED, ensure_embedded


@dataclass(frozen=True)
class Settings:
    """Train every weight of a causal language model in fp32."""

    model: str = "smollm2-135m"
    """Embedded name, local folder or hub id."""
    dataset: str = "moby_dick"
    """Embedded name, local .jsonl, .csv, .parquet or .txt, or hub data set with a text column."""
    output_dir: str = "runs/examples/classic_finetuning"
    """Where the trained model goes."""
    max_steps: int = 20
    """Optimizer steps."""
    max_length: int = 64
    """Tokens of a document; what is longer is cut off."""


settings = tyro.cli(Settings)
print(f"A demonstration of {settings.max_steps} steps on {settings.dataset}, not evidence.\n")

# The guide's own "gpt2" is on the hub: --model gpt2.
model_name = str(ensure_embedded(settings.model)) if settings.model in EMBEDDED else settings.model
# transformers 5 loads the dtype of the checkpoint unless told otherwise, and the method is fp32.
model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.eos_token  # GPT-2 and Llama have none, and padding=True needs one

corpus = load_corpus(settings.dataset)
train_texts = [document.text for document in corpus.split("train")]
eval_texts = [document.text for document in corpus.split("validation")][:16]

train_encodings = tokenizer(train_texts, truncation=True, padding=True, max_length=settings.max_length)
eval_encodings = tokenizer(eval_texts, truncation=True, padding=True, max_length=settings.max_length)

training_args = TrainingArguments(
    output_dir=settings.output_dir,
    per_device_train_batch_size=4,
    num_train_epochs=3,
    max_steps=settings.max_steps,
    save_only_model=True,  # no optimizer state: twice the model's bytes
    logging_steps=5,  # logging_dir is gone from transformers 5; report_to="tensorboard" has its own setting
)

trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=Dataset.from_dict(train_encodings),  # rows; a BatchEncoding is a dict of columns
    eval_dataset=Dataset.from_dict(eval_encodings),
    # Labels, without which the Trainer has no loss: the tokens themselves, and none for padding.
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
)

before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]

print(f"\nHeld-out loss before {before:.4f} (perplexity {exp(before):.1f}), after {after:.4f} ({exp(after):.1f}).")
print(f"Model in {settings.output_dir}/checkpoint-{trainer.state.global_step}")
