"""Text data: three embedded corpora, local files, hub data sets; document splits, packed blocks, labelled examples.

Splits are by document (chapter, speech, row), never by block, so that no text is on both sides. Nothing here imports
torch; a data set is read and checked before any model is loaded.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from experiments.harness.experiment import UserError, unknown

Split = Literal["train", "validation", "test"]

EMBEDDED = {
    "moby_dick": ("chapter",),
    "state_of_the_union": ("year", "speaker"),
    "movie_sentiment": ("id",),
}
"""Embedded corpora and the fields that name a document; provenance and licence in ``experiments/data/README.md``."""

_FILE_TYPES = (".jsonl", ".csv", ".parquet", ".txt")
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Document:
    """One unit of text that is never divided between splits."""

    id: str
    text: str
    label: str | None = None
    """Name of its class, in a labelled corpus."""


@dataclass(frozen=True)
class Corpus:
    """Documents in their original order, and a fingerprint (SHA-256) of all their text and labels."""

    name: str
    documents: tuple[Document, ...]
    fingerprint: str

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in a labelled corpus; a class's index here is its number."""
        return tuple(sorted({d.label for d in self.documents if d.label is not None}))

    def split(self, split: Split) -> list[Document]:
        """A tenth of the documents (at least one) for validation, a tenth for test, the rest for training.

        Documents are assigned by the hash of their id, so that the split depends on no seed and on no order.
        """
        ranked = sorted(self.documents, key=lambda d: hashlib.sha256(d.id.encode()).digest())
        held_out = max(1, round(_HELD_OUT_SHARE * len(ranked)))
        parts = {
            "test": ranked[:held_out],
            "validation": ranked[held_out : 2 * held_out],
            "train": ranked[2 * held_out :],
        }
        chosen = {d.id for d in parts[split]}
        return [d for d in self.documents if d.id in chosen]


class Tokenizer(Protocol):
    """What packing and encoding need of a Hugging Face tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: list[str], **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Blocks:
    """Packed text: no padding, every token belongs to a known document."""

    input_ids: NDArray[np.int64]
    """Shape (blocks, block length)."""
    document: NDArray[np.int64]
    """Index into ``document_ids`` for every token, same shape."""
    document_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A block as the Trainer takes it: the labels of a language model are its input."""
        return {"input_ids": self.input_ids[index], "labels": self.input_ids[index]}

    @property
    def tokens(self) -> int:
        """Of all blocks together."""
        return self.input_ids.size

    def spread(self, limit: int | None) -> Blocks:
        """At most ``limit`` blocks, evenly spread over the text."""
        if limit is None or limit >= len(self.input_ids):
            return self
        return self._rows(np.linspace(0, len(self.input_ids) - 1, limit).round().astype(int))

    def drawn(self, count: int, seed: int) -> Blocks:
        """``count`` different blocks, drawn by ``seed``; a smaller draw of a seed is part of a larger one.

        Raises:
            UserError: if there are not as many.
        """
        if count > len(self):
            raise UserError(
                f"the text must have at least {count} blocks of {self.input_ids.shape[1]} tokens, got {len(self)}; "
                "take fewer or shorter blocks, or a longer text"
            )
        return self._rows(np.random.default_rng(seed).permutation(len(self))[:count])

    def _rows(self, rows: NDArray[np.int64]) -> Blocks:
        return Blocks(self.input_ids[rows], self.document[rows], self.document_ids)


@dataclass(frozen=True)
class Examples:
    """Tokenised documents with a class each; they are padded when a batch is put together, not before."""

    input_ids: tuple[list[int], ...]
    labels: NDArray[np.int64]
    """Number of the class, shape (examples,)."""
    document_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An example as the Trainer takes it."""
        return {"input_ids": self.input_ids[index], "labels": int(self.labels[index])}

    @property
    def tokens(self) -> int:
        """Of all examples together, without padding."""
        return sum(map(len, self.input_ids))


def load_corpus(dataset: str, *, labelled: bool = False) -> Corpus:
    """Load a corpus by embedded name, path of a local file, or hub id (``owner/name`` or ``owner/name:config``).

    A ``.jsonl`` has a ``text`` field, a ``.csv`` or ``.parquet`` a ``text`` column, one document a row; in a ``.txt``
    documents are separated by two or more empty lines. A labelled corpus needs a ``label`` beside the text. Of
    documents with the same text the first is kept, so that no text is both trained and tested on (the embedded
    unlabelled corpora have none twice in two splits).

    Raises:
        UserError: if there is no such data set, it cannot be read, or it has fewer than three documents; if it is to
            be labelled and a label is missing, there is one class only, or a held-out class is not in training.
    """
    fields = ("text", "label") if labelled else ("text",)
    rows: Iterable[dict[str, Any]]
    if dataset in EMBEDDED:
        rows = _embedded(dataset, labelled)
    elif dataset.endswith(_FILE_TYPES):
        rows = _local(Path(dataset), fields)
    elif "/" in dataset:
        rows = _hub(dataset, fields)
    else:
        raise UserError(
            unknown("data set", dataset, EMBEDDED) + f"; a local file ends in {', '.join(_FILE_TYPES)}, "
            "a hub data set is written owner/name"
        )
    documents = [d for d in _documents(rows, EMBEDDED.get(dataset, ()), labelled, dataset) if d.text.strip()]
    if labelled or dataset not in EMBEDDED:
        documents = list({d.text.strip(): d for d in reversed(documents)}.values())[::-1]
    if len(documents) < 3:
        raise UserError(
            f"data set {dataset!r} has {len(documents)} non-empty document(s), and at least 3 are needed (train, "
            "validation and test never share a document); separate documents by two empty lines in a .txt, "
            "or give one JSON object with a text field a line in a .jsonl"
        )
    digest = hashlib.sha256()
    for document in documents:
        label = b"" if document.label is None else document.label.encode() + b"\0"
        digest.update(document.id.encode() + b"\0" + document.text.encode() + b"\0" + label)
    corpus = Corpus(dataset, tuple(documents), digest.hexdigest())
    if labelled:
        _check_classes(corpus)
    return corpus


def pack(documents: Sequence[Document], tokenizer: Tokenizer, block_tokens: int) -> Blocks:
    """Tokenise documents, join them with the end-of-text token, cut into full blocks and drop the short rest.

    Args:
        documents: in the order in which they are joined.
        tokenizer: a Hugging Face tokenizer.
        block_tokens: length of a block in tokens.

    Raises:
        UserError: if the text is shorter than one block.
    """
    encoded = tokenizer([d.text for d in documents], add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = np.concatenate([np.asarray(ids + end, dtype=np.int64) for ids in encoded])
    owner = np.repeat(np.arange(len(encoded)), [len(ids) + len(end) for ids in encoded])
    count = len(tokens) // block_tokens
    if count == 0:
        raise UserError(
            f"a split has {len(tokens)} tokens, fewer than one block of {block_tokens}; "
            "lower --sequence-length or give more text"
        )
    shape = (count, block_tokens)
    kept = count * block_tokens
    return Blocks(tokens[:kept].reshape(shape), owner[:kept].reshape(shape), tuple(d.id for d in documents))


def stratified(documents: Sequence[Document], count: int, seed: int) -> list[Document]:
    """``count`` labelled documents (at most all) in their order, drawn by ``seed``, each class in its proportion.

    Within a class of n documents the i-th one drawn (from 0) stands at (i + 1/2)/n, and those that stand lowest are
    taken: a smaller draw of the same seed is part of a larger one.
    """
    draw = np.random.default_rng(seed)
    label = np.array([d.label for d in documents])
    place = np.empty(len(documents))
    for name in np.unique(label):
        members = np.flatnonzero(label == name)
        place[members] = (draw.permutation(len(members)) + 0.5) / len(members)
    return [documents[i] for i in np.sort(np.argsort(place, kind="stable")[:count])]


def encode(documents: Sequence[Document], tokenizer: Tokenizer, max_tokens: int, classes: Sequence[str]) -> Examples:
    """Tokenise labelled documents one by one, with the model's special tokens, and cut off what is too long.

    Args:
        documents: labelled ones.
        tokenizer: a Hugging Face tokenizer.
        max_tokens: tokens of an example, special tokens among them.
        classes: names in the order of their numbers.
    """
    texts = [d.text for d in documents]
    encoded = tokenizer(texts, truncation=True, max_length=max_tokens, verbose=False)["input_ids"]
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[str(d.label)] for d in documents], dtype=np.int64)
    return Examples(tuple(encoded), labels, tuple(d.id for d in documents))


def _embedded(name: str, labelled: bool) -> list[dict[str, Any]]:
    path = resources.files("experiments") / "data" / f"{name}.jsonl.gz"
    rows: list[dict[str, Any]] = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    if not labelled:
        return rows
    if "rating" not in rows[0]:
        raise UserError(
            f"data set {name!r} has no labels, and classification needs them; use movie_sentiment, a hub data set, or "
            "a local .csv, .jsonl or .parquet with text and label"
        )
    # A mean rating of exactly 0 is of neither class (37 sentences).
    return [{**row, "label": "positive" if row["rating"] > 0 else "negative"} for row in rows if row["rating"] != 0]


def _documents(
    rows: Iterable[dict[str, Any]], id_fields: Sequence[str], labelled: bool, dataset: str
) -> list[Document]:
    """Documents from rows with a ``text`` field; a repeated name gets the row number."""
    documents, seen = [], set()
    for index, row in enumerate(rows):
        name = " ".join(str(row[f]) for f in id_fields) or str(index)
        if name in seen:
            name = f"{name} #{index}"
        seen.add(name)
        label = row["label"] if labelled else None
        if labelled and (isinstance(label, (list, dict)) or label is None or not str(label).strip()):
            raise UserError(
                f"every row of data set {dataset!r} needs one label, got {label!r} in row {index + 1}; "
                "give it a class, or leave the row out"
            )
        text = "" if row["text"] is None else str(row["text"])
        documents.append(Document(name, text, None if label is None else str(label).strip()))
    return documents


def _check_classes(corpus: Corpus) -> None:
    if len(corpus.classes) < 2:
        raise UserError(
            f"data set {corpus.name!r} must have at least two classes, got one: {corpus.classes[0]!r}; "
            "give documents of another class too"
        )
    trained = {d.label for d in corpus.split("train")}
    for split in ("validation", "test"):
        alien = sorted(str(d.label) for d in corpus.split(split) if d.label not in trained)
        if alien:
            raise UserError(
                f"every class of the {split} documents must occur in training, and {alien[0]!r} of data set "
                f"{corpus.name!r} does not; give more documents of it, or leave it out"
            )


def _local(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"data file not found: {path}")
    try:
        if path.suffix == ".parquet":
            import pandas

            frame = pandas.read_parquet(path).astype(object)
            rows = frame.where(frame.notna(), None).to_dict("records")
        else:
            text = path.read_text(encoding="utf-8").removeprefix("\ufeff")
            if path.suffix == ".txt":
                rows = [{"text": part} for part in re.split(r"\n[ \t]*\n[ \t]*\n+", text)]
            elif path.suffix == ".csv":
                csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a document may be long
                rows = list(csv.DictReader(io.StringIO(text)))
            else:
                rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start}: {error.reason}); convert it, for example with iconv"
        ) from error
    except (ValueError, OSError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as {path.suffix}: {error}") from error
    for field in fields:
        if rows and not all(isinstance(row, dict) and field in row and row["text"] is not None for row in rows):
            found = ", ".join(map(str, rows[0])) if isinstance(rows[0], dict) else type(rows[0]).__name__
            raise UserError(f"every row of {path} needs a {field!r} field; the first row has: {found}")
    return rows


def _hub(dataset: str, fields: Sequence[str]) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name, _, config = dataset.partition(":")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would print each of its retries
    try:
        rows = load_dataset(name, config or None, split="train")
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"data set {dataset!r} could not be loaded from the hub ({reason}); check the name and the network, "
            f"or use an embedded one: {', '.join(EMBEDDED)}"
        ) from error
    for field in fields:
        if field not in rows.column_names:
            raise UserError(f"data set {dataset!r} needs a {field!r} column; it has: {', '.join(rows.column_names)}")
    return rows
