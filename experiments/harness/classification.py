"""One run of training a sequence classifier: its settings, its ingredients, and what its arms say of the test split.

The counterpart of ``causal_lm``; an experiment adds its own fields by subclassing ``ClassificationRun``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from experiments.harness.experiment import UserError
from experiments.harness.record import ExampleOutcome, Measurements, Metric, Observation, Scalar
from experiments.harness.training_run import TrainingRun, hidden

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import EvalPrediction

    from experiments.harness.data import Corpus, Document, Examples
    from experiments.harness.evaluation import HeldOutClasses
    from forge.presets import Preset

CLASSIFIER_LOSS = Metric("eval_loss", "nats/example", "minimize")
"""The cross-entropy, under the name that a loss has in every task."""
ACCURACY = Metric("accuracy", "1", "maximize")
MACRO_F1 = Metric("macro_f1", "1", "maximize")


@dataclass(frozen=True)
class ClassificationRun(TrainingRun):
    """Model, data and recipe of one training run."""

    model: str = "minilm-l6"
    """Embedded model (minilm-l6, smollm2-135m, tiny-random-encoder), local folder, or hub id."""
    dataset: str = "movie_sentiment"
    """Embedded corpus (movie_sentiment), local .csv, .jsonl or .parquet with text and label, or hub id."""
    method: Literal["full", "lora"] = "full"
    """What is trained: all weights, or LoRA adapters and the head."""
    batch_size: int = 16
    """Examples per optimizer step."""
    sequence_length: int = 64
    """Tokens of an example at most, special tokens among them; batches are padded to their longest one."""
    train_examples: int | None = None
    """Size of a training subset drawn by the seed, each class in its proportion; None: all."""
    validation_examples: int = 256
    """Examples of each evaluation during training (at most all), the same for every seed."""
    test_examples: int = 1_000
    """Examples of the final evaluation (at most all), the same for every seed."""
    task: Annotated[Literal["classification"], hidden()] = "classification"
    """Tells the command line which models and data sets will do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("validation_examples", "test_examples")
        if self.sequence_length < 3:
            raise UserError(
                "sequence_length must be at least 3 (two special tokens and one of the text), "
                f"got {self.sequence_length}"
            )
        if self.train_examples is not None:
            self._at_least_one("train_examples")


@dataclass(frozen=True)
class Ingredients:
    """What a run trains and on what."""

    model: nn.Module
    train: Examples
    validation: Examples
    test: Examples
    classes: tuple[str, ...]
    """Names of the classes in the order of their numbers."""
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]
    """Makes a batch and pads it to its longest example."""
    digests: dict[str, str]
    """SHA-256 of the initial ``model`` weights and fingerprint of the ``data``."""


def prepare(run: ClassificationRun, seed: int, preset: Preset | None = None) -> Ingredients:
    """Load and encode the data, set the seed, and only then build the model with its head and adapters.

    A ``preset`` prepares the model instead of the harness's preset for ``run.method``.

    Raises:
        UserError: if the model has fewer positions than ``sequence_length``, or there are not as many training
            documents as ``train_examples``, or these leave a class without an example.
    """
    from transformers import DataCollatorWithPadding, set_seed

    from experiments.harness.data import encode, load_corpus, stratified
    from experiments.harness.models import load_classifier, load_tokenizer, weights_sha256

    corpus, tokenizer = load_corpus(run.dataset, labelled=True), load_tokenizer(run.model)
    if run.sequence_length > tokenizer.model_max_length:
        raise UserError(
            f"sequence_length must be at most {tokenizer.model_max_length}, the positions of {run.model}, "
            f"got {run.sequence_length}; lower --sequence-length"
        )
    documents = {
        "train": _training_documents(run, corpus, seed),
        "validation": stratified(corpus.split("validation"), run.validation_examples, seed=0),
        "test": stratified(corpus.split("test"), run.test_examples, seed=0),
    }
    parts = {name: encode(part, tokenizer, run.sequence_length, corpus.classes) for name, part in documents.items()}
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_seed(seed)
    model = load_classifier(
        run.model, len(corpus.classes), method=run.method, random_init=run.random_init, preset=preset
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return Ingredients(
        model=model,
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        classes=corpus.classes,
        collator=DataCollatorWithPadding(tokenizer),
        digests={"model": weights_sha256(model), "data": corpus.fingerprint},
    )


def _training_documents(run: ClassificationRun, corpus: Corpus, seed: int) -> list[Document]:
    from experiments.harness.data import stratified

    documents = corpus.split("train")
    if run.train_examples is None:
        return documents
    if run.train_examples > len(documents):
        raise UserError(
            f"train_examples must be at most {len(documents)}, the training documents of {run.dataset}, "
            f"got {run.train_examples}; lower --train-examples or leave it out"
        )
    subset = stratified(documents, run.train_examples, seed)
    absent = set(corpus.classes) - {d.label for d in subset}
    if absent:
        raise UserError(
            f"train_examples must leave an example of every class, got {run.train_examples}, which leave none of "
            f"{min(absent)!r}; raise --train-examples"
        )
    return subset


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """``cross_entropy``, ``accuracy`` and ``macro_f1`` of an evaluation during training, for ``training.train``."""
    from experiments.harness.evaluation import classification_metrics

    return classification_metrics(prediction.predictions, prediction.label_ids)


def outcomes_on_test(
    run: ClassificationRun,
    ingredients: Ingredients,
    arms: Mapping[str, Callable[[], AbstractContextManager[None]]],
) -> tuple[dict[str, HeldOutClasses], float]:
    """Test outcome of every arm, each under the context that puts its weights in place, and the seconds it took."""
    from experiments.harness.evaluation import held_out_classes, over_arms
    from experiments.harness.training import autocast

    return over_arms(
        arms,
        partial(
            held_out_classes,
            ingredients.model,
            ingredients.test,
            ingredients.collator,
            run.batch_size,
            autocast(run.precision),
        ),
    )


def observe(
    into: Measurements,
    held_out: HeldOutClasses,
    step: int,
    arm: str,
    *,
    per_example: Sequence[Metric] = (CLASSIFIER_LOSS,),
    **conditions: Scalar,
) -> None:
    """Add an arm's test outcome: the three metrics as observations, those of ``per_example`` for every example too.

    Args:
        into: gets the outcome, or the note that it diverged where the cross-entropy is not finite.
        held_out: of the arm.
        step: optimizer steps that were taken.
        arm: its name.
        per_example: any of ``CLASSIFIER_LOSS`` and ``ACCURACY`` (1 or 0); each adds a row an example to the record.
        **conditions: further fields of the observations.
    """
    metrics = held_out.metrics
    if not math.isfinite(metrics["cross_entropy"]):
        into.diverged = f"the test cross-entropy of arm {arm} is {metrics['cross_entropy']}"
        return
    for metric, name in ((CLASSIFIER_LOSS, "cross_entropy"), (ACCURACY, "accuracy"), (MACRO_F1, "macro_f1")):
        into.observations.append(Observation.of(metric, metrics[name], step, split="test", arm=arm, **conditions))
    values = {CLASSIFIER_LOSS: held_out.nll, ACCURACY: held_out.correct}
    for metric in per_example:
        for document, value, tokens in zip(held_out.document_ids, values[metric], held_out.tokens, strict=True):
            into.examples.append(
                ExampleOutcome(example=document, arm=arm, metric=metric.name, value=float(value), tokens=tokens)
            )
