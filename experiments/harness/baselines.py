"""Baselines without an update: a pretrained model as it is, and with a few examples.

A language model is given examples in its prompt: blocks of training text before each test block. An encoder has no
prompt, and an untrained head says nothing; it is judged by its embeddings instead: a text gets the class whose
prototype is nearest (cosine). The prototype is the embedding of the class's name (zero-shot), or the mean embedding of
a few labelled examples (few-shot; nearest class mean, as in arXiv:1703.05175 without training).
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.harness.causal_lm import CausalLMRun
from experiments.harness.classification import ACCURACY, MACRO_F1, ClassificationRun
from experiments.harness.experiment import UserError
from experiments.harness.record import EVAL_LOSS, OTHER_LOSS, ExampleOutcome, Measurements, Observation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from experiments.harness import causal_lm, classification
    from experiments.harness.data import Blocks, Examples
    from experiments.harness.evaluation import HeldOutClasses, HeldOutLoss

_CONTEXT = "(context)"


def observe_baseline(into: Measurements, run: Any, ingredients: Any, shots: int, seed: int) -> None:
    """Add the test outcome of the model as it is (no shots: also on the other domain) or with a few examples.

    Of the classifier no loss is recorded: a nearest prototype gives no probabilities.

    Args:
        into: gets the outcome at step 0.
        run: the recipe; of a language model with ``other_dataset``.
        ingredients: of the run, with a plain model.
        shots: blocks in the prompt, or examples of each class; 0: none.
        seed: of the model's head and of the draw.
    """
    from experiments.harness.causal_lm import losses_on_test, observe, on_other_text
    from experiments.harness.methods import build

    ingredients = dataclasses.replace(ingredients, model=build(run, ingredients, seed, None))
    if isinstance(run, ClassificationRun):
        held_out = nearest_prototype(run, ingredients, shots, seed)
        for metric in (ACCURACY, MACRO_F1):
            value = held_out.metrics[metric.name]
            into.observations.append(Observation.of(metric, value, 0, split="test", arm="final"))
        for name, correct, tokens in zip(held_out.document_ids, held_out.correct, held_out.tokens, strict=True):
            into.examples.append(
                ExampleOutcome(example=name, arm="final", metric=ACCURACY.name, value=float(correct), tokens=tokens)
            )
    elif shots:
        observe(into, few_shot_loss(run, ingredients, shots, seed), EVAL_LOSS, 0, "final")
    else:
        for metric, part in (
            (EVAL_LOSS, ingredients),
            (OTHER_LOSS, on_other_text(run, ingredients, run.other_dataset)),
        ):
            observe(into, losses_on_test(run, part, {"final": nullcontext})[0]["final"], metric, 0, "final")


def with_context(blocks: Blocks, source: Blocks, count: int, seed: int) -> Blocks:
    """Every block with the same ``count`` blocks of another text before it, drawn by the seed.

    The context, and the first token of the block itself (which no evaluation without context predicts), belong to a
    document of their own.

    Raises:
        UserError: if the other text has fewer blocks.
    """
    from experiments.harness.data import Blocks

    if count > len(source):
        raise UserError(f"shots must be at most the {len(source)} blocks of training text, got {count}; lower --shots")
    rows = np.random.default_rng(seed).choice(len(source), size=count, replace=False)
    context = source.input_ids[rows].ravel()
    ids = np.concatenate([np.tile(context, (len(blocks), 1)), blocks.input_ids], axis=1)
    document = np.full_like(ids, len(blocks.document_ids))
    document[:, len(context) + 1 :] = blocks.document[:, 1:]
    return Blocks(ids, document, (*blocks.document_ids, _CONTEXT))


def few_shot_loss(run: CausalLMRun, ingredients: causal_lm.Ingredients, count: int, seed: int) -> HeldOutLoss:
    """Test loss of the model as it is with ``count`` blocks of training text in its prompt."""
    from experiments.harness.causal_lm import losses_on_test
    from experiments.harness.evaluation import HeldOutLoss

    test = with_context(ingredients.test, ingredients.train, count, seed)
    losses, _ = losses_on_test(run, dataclasses.replace(ingredients, test=test), {"few-shot": nullcontext})
    held_out = losses["few-shot"]
    kept = [i for i, name in enumerate(held_out.document_ids) if name != _CONTEXT]
    parts = (held_out.document_ids, held_out.nll, held_out.tokens)
    return HeldOutLoss(*(tuple(part[i] for i in kept) for part in parts))  # type: ignore[arg-type]


def nearest_prototype(
    run: ClassificationRun, ingredients: classification.Ingredients, shots: int, seed: int
) -> HeldOutClasses:
    """Classes of the test split by cosine to prototypes; the cosines stand as logits, of which only the order counts.

    Args:
        run: the recipe.
        ingredients: with the pretrained model.
        shots: examples of each class (at most all), drawn by the seed; 0: the name of the class.
        seed: of the draw.
    """
    from experiments.harness.evaluation import HeldOutClasses

    if shots:
        drawn = _drawn(ingredients.train, len(ingredients.classes), shots, seed)
        embedded = _embeddings(run, ingredients, drawn)
        prototypes = np.stack([embedded[drawn.labels == label].mean(axis=0) for label in np.unique(drawn.labels)])
    else:
        prototypes = _embeddings(run, ingredients, _names(run, ingredients))
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    test = ingredients.test
    cosines = _embeddings(run, ingredients, test) @ prototypes.T
    return HeldOutClasses(test.document_ids, tuple(map(len, test.input_ids)), test.labels, cosines)


def _drawn(examples: Examples, classes: int, shots: int, seed: int) -> Examples:
    from experiments.harness.data import Examples

    draw = np.random.default_rng(seed)
    members = [np.flatnonzero(examples.labels == label) for label in range(classes)]
    rows = np.concatenate([draw.permutation(own)[:shots] for own in members])
    ids, names = examples.input_ids, examples.document_ids
    return Examples(tuple(ids[i] for i in rows), examples.labels[rows], tuple(names[i] for i in rows))


def _names(run: ClassificationRun, ingredients: classification.Ingredients) -> Examples:
    from experiments.harness.data import Examples
    from experiments.harness.models import load_tokenizer

    classes = ingredients.classes
    ids = load_tokenizer(run.model)([*classes], truncation=True, max_length=run.sequence_length)["input_ids"]
    return Examples(tuple(ids), np.arange(len(classes)), classes)


def _embeddings(
    run: ClassificationRun, ingredients: classification.Ingredients, examples: Examples
) -> NDArray[np.float64]:
    """Mean of the last hidden states over the tokens of each example, of unit length: shape (examples, width)."""
    import torch

    from experiments.harness.training import autocast

    model: Any = ingredients.model
    device, parts = next(model.parameters()).device, []
    model.eval()
    with torch.no_grad(), autocast(run.precision)():
        for start in range(0, len(examples), run.batch_size):
            rows = [examples[i] for i in range(start, min(start + run.batch_size, len(examples)))]
            inputs = {name: t.to(device) for name, t in ingredients.collator(rows).items() if name != "labels"}
            hidden = model.base_model(**inputs).last_hidden_state.double()
            mask = inputs["attention_mask"][..., None].double()
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            parts.append(torch.nn.functional.normalize(mean, dim=1).cpu().numpy())
    return np.concatenate(parts)
