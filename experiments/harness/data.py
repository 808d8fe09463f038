"""Text data: three embedded corpora, local files, hub data sets; document splits and packing into full blocks.

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


@dataclass(frozen=True)
class Corpus:
    """Documents in their original order, and a fingerprint of all their text (SHA-256)."""

    name: str
    documents: tuple[Document, ...]
    fingerprint: str

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
    """What packing needs of a Hugging Face tokenizer."""

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

    def spread(self, limit: int | None) -> Blocks:
        """At most ``limit`` blocks, evenly spread over the text."""
        if limit is None or limit >= len(self.input_ids):
            return self
        rows = np.linspace(0, len(self.input_ids) - 1, limit).round().astype(int)
        return Blocks(self.input_ids[rows], self.document[rows], self.document_ids)


def load_corpus(dataset: str) -> Corpus:
    """Load a corpus by embedded name, path of a local file, or hub id (``owner/name`` or ``owner/name:config``).

    A ``.jsonl`` has a ``text`` field, a ``.csv`` or ``.parquet`` a ``text`` column, one document a row; in a ``.txt``
    documents are separated by two or more empty lines.

    Raises:
        UserError: if there is no such data set, it cannot be read, or it has fewer than three documents.
    """
    if dataset in EMBEDDED:
        documents = _embedded(dataset)
    elif dataset.endswith(_FILE_TYPES):
        documents = _local(Path(dataset))
    elif "/" in dataset:
        documents = _hub(dataset)
    else:
        raise UserError(
            unknown("data set", dataset, EMBEDDED) + f"; a local file ends in {', '.join(_FILE_TYPES)}, "
            "a hub data set is written owner/name"
        )
    documents = [d for d in documents if d.text.strip()]
    if len(documents) < 3:
        raise UserError(
            f"data set {dataset!r} has {len(documents)} non-empty document(s), and at least 3 are needed (train, "
            "validation and test never share a document); separate documents by two empty lines in a .txt, "
            "or give one JSON object with a text field a line in a .jsonl"
        )
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.id.encode() + b"\0" + document.text.encode() + b"\0")
    return Corpus(dataset, tuple(documents), digest.hexdigest())


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


def _embedded(name: str) -> list[Document]:
    path = resources.files("experiments") / "data" / f"{name}.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    return _rows(rows, EMBEDDED[name])


def _rows(rows: Iterable[dict[str, Any]], id_fields: Sequence[str] = ()) -> list[Document]:
    """Documents from rows with a ``text`` field; a repeated name gets the row number."""
    documents, seen = [], set()
    for index, row in enumerate(rows):
        name = " ".join(str(row[f]) for f in id_fields) or str(index)
        if name in seen:
            name = f"{name} #{index}"
        seen.add(name)
        documents.append(Document(name, "" if row["text"] is None else str(row["text"])))
    return documents


def _local(path: Path) -> list[Document]:
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
    if rows and not all(isinstance(row, dict) and row.get("text") is not None for row in rows):
        found = ", ".join(map(str, rows[0])) if isinstance(rows[0], dict) else type(rows[0]).__name__
        raise UserError(f"every row of {path} needs a 'text' field; the first row has: {found}")
    return _rows(rows)


def _hub(dataset: str) -> list[Document]:
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
    if "text" not in rows.column_names:
        raise UserError(f"data set {dataset!r} needs a 'text' column; it has: {', '.join(rows.column_names)}")
    return _rows(rows)
