"""Classification: labelled data, the subset and the head of a seed, metrics by hand, training, messages."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.harness.classification import (
    ACCURACY,
    CLASSIFIER_LOSS,
    ClassificationRun,
    compute_metrics,
    observe,
    outcomes_on_test,
    prepare,
)
from experiments.harness.data import Document, encode, load_corpus, stratified
from experiments.harness.evaluation import HeldOutClasses, classification_metrics, held_out_classes
from experiments.harness.experiment import UserError
from experiments.harness.models import check_causal_lm, check_model, load_classifier, load_tokenizer, weights_sha256
from experiments.harness.record import Measurements, TrialSpec
from experiments.harness.training import TrainingPlan, train
from experiments.run import _check_inputs
from forge.ema import EMACallback

TINY = "tiny-random-encoder"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """200 short texts of two classes that one word tells apart, in the proportion 3 : 1."""
    path = tmp_path_factory.mktemp("toy") / "toy.jsonl"
    draw = np.random.default_rng(0)
    rows = []
    for i in range(200):
        fill = " ".join(draw.choice(["a", "b", "c", "d"], draw.integers(1, 6)))
        rows.append(
            {"text": f"{i} {'zzz' if i % 4 == 0 else 'ooo'} {fill}", "label": "rare" if i % 4 == 0 else "usual"}
        )
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def toy_run(toy):
    return ClassificationRun(
        model=TINY, dataset=toy, sequence_length=32, learning_rate=3e-3, batch_size=8, precision="fp32"
    )


def test_movie_sentiment_has_the_class_of_its_rating_and_no_text_twice():
    plain, labelled = load_corpus("movie_sentiment"), load_corpus("movie_sentiment", labelled=True)
    assert labelled.classes == ("negative", "positive") and plain.classes == ()
    assert len(plain.documents) == 10_605 and len(labelled.documents) == 10_605 - 37 - 2
    counts = [sum(d.label == name for d in labelled.documents) for name in labelled.classes]
    assert counts == [5_325, 5_241], "5,326 and 5,242 without the two texts that occur twice"
    label = {d.id: d.label for d in labelled.documents}
    assert (label["3"], label["1"]) == ("negative", "positive"), "ratings −0.6 and 2.2667"


def test_splits_share_no_text():
    corpus = load_corpus("movie_sentiment", labelled=True)
    texts = [d.text.strip() for split in ("train", "validation", "test") for d in corpus.split(split)]
    assert len(texts) == len(set(texts)) == len(corpus.documents)


def test_the_fingerprint_is_stable_and_sees_one_label(tmp_path):
    corpus = load_corpus("movie_sentiment", labelled=True)
    assert corpus.fingerprint == "7fa714dd6b06631d4daa28ed2a1a25e8fbb1809b66c6c414c382990430c1cd5e"
    assert corpus.fingerprint != load_corpus("movie_sentiment").fingerprint
    found = {labels: load_corpus(write(tmp_path / f"{labels}.csv", labels), labelled=True) for labels in TWO_LABELLINGS}
    assert len({c.fingerprint for c in found.values()}) == 2
    assert len({load_corpus(str(tmp_path / f"{labels}.csv")).fingerprint for labels in TWO_LABELLINGS}) == 1


TWO_LABELLINGS = ("ab" * 15, "ab" * 14 + "ba")


def write(path, labels):
    rows = [f"text number {i},{label}" for i, label in enumerate(labels)]
    path.write_text("\n".join(["text,label", *rows]))
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_local_files(tmp_path, suffix):
    import pandas as pd

    frame = pd.DataFrame({"label": [i % 3 for i in range(60)], "text": [f"text {i}" for i in range(60)]})
    path = str(tmp_path / f"data{suffix}")
    if suffix == ".csv":
        frame.to_csv(path, index=False)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    corpus = load_corpus(path, labelled=True)
    assert corpus.classes == ("0", "1", "2")
    assert [d.label for d in corpus.documents] == [str(i % 3) for i in range(60)]


def test_hub_data_sets(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(30)], "label": [i % 2 for i in range(30)]})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    assert load_corpus("owner/name:config", labelled=True).classes == ("0", "1")
    assert asked == [(("owner/name", "config"), {"split": "train"})]
    rows = rows.remove_columns("label")
    with pytest.raises(UserError, match="data set 'owner/name' needs a 'label' column; it has: text"):
        load_corpus("owner/name", labelled=True)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text\na\nb\nc\n", "needs a 'label' field; the first row has: text"),
        ("a.txt", "a\n\n\nb\n\n\nc", "needs a 'label' field; the first row has: text"),
        ("a.csv", "text,label\na,x\nb,\nc,x\n", "needs one label, got '' in row 2; give it a class"),
        ("a.csv", "text,label\na,x\nb\nc,x\n", "needs one label, got None in row 2"),
        ("a.jsonl", '{"text": "a", "label": ["x", "y"]}', "needs one label, got ['x', 'y'] in row 1"),
        ("a.csv", "text,label\na,x\nb,x\nc,x\n", "must have at least two classes, got one: 'x'; give documents of"),
        ("a.csv", "text,label\na,x\na,y\na,z\n", "has 1 non-empty document"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError) as error:
        load_corpus(str(path), labelled=True)
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_held_out_class_that_is_not_in_training(tmp_path, split):
    ids = {d.id for d in load_corpus(write(tmp_path / "a.csv", "ab" * 15), labelled=True).split(split)}
    path = write(tmp_path / "b.csv", ["alien" if str(i) in ids else "ab"[i % 2] for i in range(30)])
    with pytest.raises(UserError, match=rf"every class of the {split} documents must occur in training, and 'alien' "):
        load_corpus(path, labelled=True)


def test_text_without_labels():
    with pytest.raises(UserError, match=r"'moby_dick' has no labels, .*use movie_sentiment"):
        load_corpus("moby_dick", labelled=True)


def test_examples_are_cut_off_and_a_batch_is_padded_to_its_longest(toy_run):
    corpus = load_corpus("movie_sentiment", labelled=True)
    tokenizer = load_tokenizer(TINY)
    examples = encode(corpus.documents[:3], tokenizer, 40, corpus.classes)
    assert [d.label for d in corpus.documents[:3]] == ["positive", "positive", "negative"]
    assert examples.labels.tolist() == [1, 1, 0]
    assert [len(ids) for ids in examples.input_ids] == [40, 40, len("Effective but too tepid biopic") + 1]
    assert {ids[0] for ids in examples.input_ids} == {tokenizer.cls_token_id} and examples.tokens == 111
    assert tokenizer.decode(examples.input_ids[2], skip_special_tokens=True) == corpus.documents[2].text
    ingredients = prepare(toy_run, 0)
    short = min(range(len(ingredients.train)), key=lambda i: len(ingredients.train.input_ids[i]))
    batch = ingredients.collator([ingredients.train[short], ingredients.train[short]])
    assert batch["input_ids"].shape[1] == len(ingredients.train.input_ids[short]) < 32
    assert batch["labels"].dtype == torch.int64 and batch["labels"].shape == (2,)


def test_padding_changes_nothing(toy_run):
    """The outcome of an example must not depend on its neighbours in the batch."""
    ingredients = prepare(toy_run, 0)
    assert len({len(ids) for ids in ingredients.test.input_ids}) > 2
    alone, together = (
        held_out_classes(ingredients.model, ingredients.test, ingredients.collator, size, nullcontext)
        for size in (1, 20)
    )
    np.testing.assert_allclose(alone.logits, together.logits, rtol=1e-4, atol=1e-6)


def test_subsets_are_stratified_nested_and_of_the_seed():
    labels = np.random.default_rng(0).permutation(np.repeat(["x", "y", "z"], [600, 300, 100]))
    documents = [Document(str(i), "text", str(label)) for i, label in enumerate(labels)]
    small, large = stratified(documents, 20, seed=3), stratified(documents, 200, seed=3)
    for part, counts in ((small, {"x": 12, "y": 6, "z": 2}), (large, {"x": 120, "y": 60, "z": 20})):
        assert Counter(d.label for d in part) == counts
        assert part == sorted(part, key=documents.index)
    assert set(small) < set(large)
    assert stratified(documents, 20, seed=3) == small != stratified(documents, 20, seed=4)
    assert stratified(documents, 5_000, seed=0) == documents


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_seed_is_one_head_and_one_subset(toy_run, method):
    run = dataclasses.replace(toy_run, method=method, train_examples=24)
    first, again, other = prepare(run, 0), prepare(run, 0), prepare(run, 1)
    assert first.digests == again.digests and first.train.document_ids == again.train.document_ids
    assert first.train.document_ids != other.train.document_ids
    assert first.digests["model"] != other.digests["model"] and first.digests["data"] == other.digests["data"]
    assert first.test.document_ids == other.test.document_ids
    share = sum(d.label == "rare" for d in load_corpus(run.dataset, labelled=True).split("train")) / 160
    assert np.bincount(first.train.labels)[0] == round(24 * share) and first.classes == ("rare", "usual")
    trainable = {n for n, p in first.model.named_parameters() if p.requires_grad}
    if method == "lora":
        assert all("lora_" in n or ".classifier.modules_to_save." in n for n in trainable)
        assert any("classifier" in n for n in trainable) and any("lora_" in n for n in trainable)
    else:
        assert len(trainable) == len(list(first.model.parameters()))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The tiny encoder without a head, as ``save_pretrained`` leaves it."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(7)
    load_classifier(TINY, 3).base_model.save_pretrained(folder)
    load_tokenizer(TINY).save_pretrained(folder)
    return folder


def test_only_the_head_is_drawn_for_a_pretrained_encoder(encoder):
    from transformers import AutoModel

    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = load_classifier(str(encoder), 4)
        saved = AutoModel.from_pretrained(encoder).state_dict()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in model.base_model.state_dict().items())
        heads.append(model.classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2]) and heads[0].shape == (4, 64)
    torch.manual_seed(0)
    drawn = load_classifier(str(encoder), 4, random_init=True)
    assert weights_sha256(drawn.base_model) != weights_sha256(model.base_model)


def test_missing_weights_other_than_the_head(encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = {**load_file(encoder / "model.safetensors")}
    del broken["encoder.layer.0.output.dense.bias"]
    config = (encoder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    save_file(broken, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"bert\.encoder\.layer\.0\.output\.dense\.bias is not so; save the model again"
    ):
        load_classifier(str(tmp_path), 2)
    (tmp_path / "model.safetensors").write_bytes((encoder / "model.safetensors").read_bytes())
    load_classifier(str(tmp_path), 2)
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config) | {"vocab_size": 300}))
    with pytest.raises(UserError, match=r"bert\.embeddings\.word_embeddings\.weight is not so"):
        load_classifier(str(tmp_path), 2)


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_head_of_its_own(tmp_path, num_labels):
    load_classifier(TINY, 3).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"must have no classification head of its own .* has classifier\.bias; save"):
        load_classifier(str(tmp_path), num_labels)


def test_names_of_models():
    for name in (TINY, "tiny-random", "minilm-l6", "smollm2-135m"):
        check_model(name, random_init=False)
    with pytest.raises(UserError, match="tiny-random-encoder is an encoder"):
        check_causal_lm(TINY, random_init=False)
    model = load_classifier(TINY, 2)
    assert sum(p.numel() for p in model.parameters()) == 116_706
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def spec(**settings):
    return TrialSpec(experiment="x", version=1, scale="smoke", seed=0, factors={"track": "main"}, settings=settings)


def test_the_command_line_checks_the_inputs_of_either_task(toy, tmp_path):
    classify = dataclasses.asdict(ClassificationRun(model=TINY, dataset=toy))
    _check_inputs([spec(main=classify)])
    _check_inputs([spec(**classify)])
    with pytest.raises(UserError, match="is an encoder"):
        _check_inputs([spec(main={**classify, "task": "causal_lm"})])
    with pytest.raises(UserError, match="did you mean tiny-random-encoder"):
        _check_inputs([spec(main={**classify, "model": "tiny-random-encodr"})])
    with pytest.raises(UserError, match="'moby_dick' has no labels"):
        _check_inputs([spec(main={**classify, "dataset": "moby_dick"})])


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"train_examples": 0}, "train_examples must be at least 1, got 0"),
        ({"test_examples": 0}, "test_examples must be at least 1, got 0"),
        ({"validation_examples": -1}, "validation_examples must be at least 1, got -1"),
        ({"sequence_length": 2}, "sequence_length must be at least 3 .*, got 2"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio must be in \[0, 1\], got 1.5"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
    ],
    ids=str,
)
def test_settings(changes, rule):
    with pytest.raises(UserError, match=rule):
        ClassificationRun(**changes)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"sequence_length": 257}, "must be at most 256, the positions of tiny-random-encoder, got 257; lower"),
        ({"train_examples": 161}, r"must be at most 160, the training documents of .*toy\.jsonl, got 161; lower"),
        ({"train_examples": 1}, "an example of every class, got 1, which leave none of 'rare'; raise"),
    ],
    ids=str,
)
def test_what_only_the_data_and_the_model_can_tell(toy_run, changes, rule):
    with pytest.raises(UserError, match=rule):
        prepare(dataclasses.replace(toy_run, **changes), 0)


def test_metrics_by_hand():
    """Truth 0 0 0 1 2, said 0 0 1 1 1: F1 is 4/5 for class 0, 2/4 for class 1, 0 for class 2; class 3 never occurs."""
    labels = np.array([0, 0, 0, 1, 2])
    logits = np.full((5, 4), -np.inf)
    logits[range(5), [0, 0, 1, 1, 1]] = np.log(3)
    logits[range(5), [1, 1, 0, 2, 2]] = 0
    metrics = classification_metrics(logits, labels)
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["macro_f1"] == pytest.approx((4 / 5 + 2 / 4 + 0) / 3)
    assert metrics["cross_entropy"] == pytest.approx(-(3 * math.log(3 / 4) + 2 * math.log(1 / 4)) / 5)
    held_out = HeldOutClasses(tuple("abcde"), (7,) * 5, labels, logits)
    assert held_out.correct.tolist() == [True, True, False, True, False]
    assert held_out.nll == pytest.approx(-np.log([3 / 4, 3 / 4, 1 / 4, 3 / 4, 1 / 4])) and held_out.metrics == metrics


def test_large_logits_do_not_overflow():
    metrics = classification_metrics(np.array([[1e4, 0.0], [0.0, 1e4]], dtype=np.float32), np.array([0, 0]))
    assert metrics == {"cross_entropy": 5e3, "accuracy": 0.5, "macro_f1": pytest.approx(1 / 3)}


def test_an_outcome_becomes_observations_and_example_rows():
    held_out = HeldOutClasses(("a", "b"), (3, 5), np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    into = Measurements()
    observe(into, held_out, 9, "ema_0.9", per_example=(CLASSIFIER_LOSS, ACCURACY), size=40)
    rows = [o.model_dump() for o in into.observations]
    assert [(r["metric"], r["unit"]) for r in rows] == [
        ("eval_loss", "nats/example"),
        ("accuracy", "1"),
        ("macro_f1", "1"),
    ]
    assert all((r["step"], r["arm"], r["split"], r["size"]) == (9, "ema_0.9", "test", 40) for r in rows)
    assert [(e.example, e.metric, e.tokens) for e in into.examples] == [
        ("a", "eval_loss", 3), ("b", "eval_loss", 5), ("a", "accuracy", 3), ("b", "accuracy", 5),
    ]  # fmt: skip
    assert np.mean([e.value for e in into.examples[:2]]) == pytest.approx(rows[0]["value"])
    assert [e.value for e in into.examples[2:]] == [1.0, 0.0] and into.diverged is None
    broken = dataclasses.replace(held_out, logits=np.full((2, 2), np.nan))
    observe(into, broken, 9, "raw")
    assert into.diverged == "the test cross-entropy of arm raw is nan" and len(into.observations) == 3


class Context:
    def __init__(self, work_dir):
        self.work_dir = work_dir

    def report(self, step, total, **figures):
        return None

    def should_stop(self):
        return False

    def wandb_run_id(self):
        return None


@pytest.fixture(scope="module")
def trained(toy_run, tmp_path_factory):
    """Run, ingredients, averages, test outcomes and evaluations of a short training."""
    run = dataclasses.replace(toy_run, validation_examples=19, test_examples=20)
    ingredients = prepare(run, 0)
    before, _ = outcomes_on_test(run, ingredients, {"initial": nullcontext})
    plan = TrainingPlan(
        steps=60,
        batch_size=run.batch_size,
        learning_rate=run.learning_rate,
        schedule="constant",
        warmup_ratio=run.warmup_ratio,
        weight_decay=run.weight_decay,
        precision=run.precision,
        seed=0,
        evaluate_at=(30, 60),
    )
    ema = EMACallback(decay=(0.8, 0.9))
    splits = {"validation": ingredients.validation, "test": ingredients.test}
    outcome = train(
        ingredients.model,
        ingredients.train,
        splits,
        plan,
        Context(tmp_path_factory.mktemp("trained")),
        [ema],
        collator=ingredients.collator,
        compute_metrics=compute_metrics,
    )
    arms = {"raw": nullcontext, "ema_0.8": lambda: ema.use_ema(0.8), "ema_0.9": lambda: ema.use_ema(0.9)}
    after, seconds = outcomes_on_test(run, ingredients, arms)
    assert seconds > 0
    return SimpleNamespace(outcome=outcome, before=before["initial"], after=after)


def test_a_tiny_encoder_learns_a_separable_data_set(trained):
    assert trained.before.metrics["cross_entropy"] == pytest.approx(math.log(2), abs=0.15)
    assert trained.after["raw"].metrics["accuracy"] == 1.0 == trained.after["raw"].metrics["macro_f1"]
    assert trained.after["raw"].metrics["cross_entropy"] < 0.1
    assert len(set(trained.after["raw"].labels)) == 2


def test_every_split_is_evaluated_with_raw_and_averaged_weights(trained):
    rows = trained.outcome.evaluations
    for split in ("validation", "test"):
        for arm in ("", "ema_0.8_", "ema_0.9_"):
            for metric in ("loss", "cross_entropy", "accuracy", "macro_f1"):
                assert [r["step"] for r in rows if f"eval_{split}_{arm}{metric}" in r] == [30, 60]
    last = {key: value for row in rows if row["step"] == 60 for key, value in row.items()}
    for arm, key in (("raw", ""), ("ema_0.8", "ema_0.8_"), ("ema_0.9", "ema_0.9_")):
        for metric, value in trained.after[arm].metrics.items():
            assert last[f"eval_test_{key}{metric}"] == pytest.approx(value, rel=1e-5), (arm, metric)
    assert len({last[f"eval_test_{k}cross_entropy"] for k in ("", "ema_0.8_", "ema_0.9_")}) == 3
    for split in ("validation", "test"):
        assert last[f"eval_{split}_loss"] == pytest.approx(last[f"eval_{split}_cross_entropy"], rel=1e-3)


def test_evaluation_time_counts_each_split_once(trained):
    reported = sum(v for row in trained.outcome.evaluations for k, v in row.items() if k.endswith("_runtime"))
    assert reported <= trained.outcome.evaluation_sec and trained.outcome.training_sec > 0


@pytest.mark.slow
def test_minilm_is_given_a_head_of_every_seed():
    first, again, other = (prepare(ClassificationRun(train_examples=16), seed) for seed in (0, 0, 1))
    assert first.digests == again.digests and first.digests["model"] != other.digests["model"]
    assert weights_sha256(first.model.base_model) == weights_sha256(other.model.base_model)
