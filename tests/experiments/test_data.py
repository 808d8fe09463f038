"""Corpora, splits by document, packing, and the messages about data that cannot be used."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import random
import re
from importlib import resources

import numpy as np
import pandas as pd
import pytest

from experiments.harness.data import EMBEDDED, Blocks, Corpus, Document, load_corpus, pack
from experiments.harness.experiment import UserError
from experiments.harness.models import load_tokenizer

DATA = resources.files("experiments") / "data"
TEXTS = ["one", "two, with a comma and «кавычки»", "three\nlines", "four"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-random")


def test_embedded_files_are_those_of_the_readme():
    listed = re.findall(r"([0-9a-f]{64})  (\S+)", (DATA / "README.md").read_text(encoding="utf-8"))
    assert {name for _, name in listed} == {f"{name}.jsonl.gz" for name in EMBEDDED}
    for digest, name in listed:
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("name", "count"), [("moby_dick", 138), ("state_of_the_union", 78), ("movie_sentiment", 10_605)]
)
def test_embedded_corpora(name, count):
    corpus = load_corpus(name)
    assert len(corpus.documents) == count == len({d.id for d in corpus.documents})
    rows = gzip.decompress((DATA / f"{name}.jsonl.gz").read_bytes()).decode().splitlines()
    assert [d.text for d in corpus.documents] == [json.loads(row)["text"] for row in rows]


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_splits_are_disjoint_and_use_every_document_in_order(name):
    corpus = load_corpus(name)
    parts = {split: [d.id for d in corpus.split(split)] for split in ("train", "validation", "test")}
    together = [i for part in parts.values() for i in part]
    assert len(together) == len(set(together)) == len(corpus.documents)
    assert len(parts["test"]) == len(parts["validation"]) == round(0.1 * len(corpus.documents))
    position = {d.id: i for i, d in enumerate(corpus.documents)}
    for part in parts.values():
        assert part == sorted(part, key=position.get)


def test_the_split_depends_on_no_seed_and_no_order():
    corpus = load_corpus("moby_dick")
    expected = {d.id for d in corpus.split("test")}
    shuffled = list(corpus.documents)
    random.Random(1).shuffle(shuffled)
    assert {d.id for d in dataclasses.replace(corpus, documents=tuple(shuffled)).split("test")} == expected
    random.seed(2)
    np.random.seed(3)
    assert {d.id for d in load_corpus("moby_dick").split("test")} == expected


@pytest.mark.parametrize("count", [3, 4, 15])
def test_even_the_smallest_corpus_has_three_parts(count):
    corpus = Corpus("x", tuple(Document(str(i), "text") for i in range(count)), "")
    assert all(corpus.split(split) for split in ("train", "validation", "test"))


def test_packing_by_hand(tokenizer):
    documents = [Document("a", "abc"), Document("b", "de"), Document("c", "fghij")]
    blocks = pack(documents, tokenizer, 4)
    letters = {letter: tokenizer(letter)["input_ids"][0] for letter in "abcdefghij"} | {"|": tokenizer.eos_token_id}
    expected = [[letters[letter] for letter in row] for row in ("abc|", "de|f", "ghij")]
    assert blocks.input_ids.tolist() == expected, "the end-of-text token of the last document is the short rest"
    assert blocks.document.tolist() == [[0, 0, 0, 0], [1, 1, 1, 2], [2, 2, 2, 2]]
    assert blocks.document_ids == ("a", "b", "c")


def test_packed_text_is_whole_unpadded_and_knows_its_documents(tokenizer):
    documents = load_corpus("moby_dick").split("validation")
    blocks = pack(documents, tokenizer, 128)
    assert blocks.input_ids.shape == blocks.document.shape and blocks.input_ids.shape[1] == 128
    flat, owner = blocks.input_ids.ravel(), blocks.document.ravel()
    assert (np.diff(owner) >= 0).all()
    for index, document in enumerate(documents[:-1]):
        ids = flat[owner == index]
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[:-1]) == document.text
    assert len(flat) > sum(len(d.text.encode()) + 1 for d in documents) - 128


def test_spread_is_even_and_keeps_the_ends():
    blocks = Blocks(np.arange(20).reshape(10, 2), np.zeros((10, 2), dtype=np.int64), ("a",))
    assert blocks.spread(4).input_ids[:, 0].tolist() == [0, 6, 12, 18]
    assert blocks.spread(None) is blocks is blocks.spread(10)


def test_a_draw_has_different_blocks_and_holds_the_smaller_draws_of_its_seed():
    blocks = Blocks(np.arange(20).reshape(10, 2), np.arange(20).reshape(10, 2), ("a",))
    drawn = blocks.drawn(6, seed=0).input_ids[:, 0].tolist()
    assert len(set(drawn)) == 6
    assert blocks.drawn(3, seed=0).input_ids[:, 0].tolist() == drawn[:3]
    assert (blocks.drawn(6, seed=0).document == blocks.drawn(6, seed=0).input_ids).all()
    assert blocks.drawn(6, seed=1).input_ids[:, 0].tolist() != drawn
    assert sorted(blocks.drawn(10, seed=0).input_ids[:, 0].tolist()) == list(range(0, 20, 2))
    with pytest.raises(UserError, match="the text must have at least 11 blocks of 2 tokens, got 10"):
        blocks.drawn(11, seed=0)


def test_a_split_shorter_than_a_block(tokenizer):
    with pytest.raises(UserError, match="a split has 4 tokens, fewer than one block of 8; lower --sequence-length"):
        pack([Document("a", "abc")], tokenizer, 8)


def write(path, texts=TEXTS):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": t, "n": 1}, ensure_ascii=False) for t in texts), encoding="utf-8")
    elif path.suffix == ".txt":
        path.write_text("\n\n\n".join(texts), encoding="utf-8")
    elif path.suffix == ".csv":
        pd.DataFrame({"n": 1, "text": texts}).to_csv(path, index=False)
    else:
        pd.DataFrame({"n": 1, "text": texts}).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".txt"])
def test_local_files(tmp_path, suffix):
    corpus = load_corpus(write(tmp_path / f"data{suffix}"))
    assert [d.text for d in corpus.documents] == TEXTS
    assert len({d.id for d in corpus.documents}) == 4
    changed = load_corpus(write(tmp_path / f"other{suffix}", [*TEXTS[:-1], "four!"]))
    assert changed.fingerprint != corpus.fingerprint
    assert load_corpus(write(tmp_path / f"again{suffix}")).fingerprint == corpus.fingerprint


def test_the_fingerprint_is_sha256_of_ids_and_texts():
    corpus = load_corpus("moby_dick")
    digest = hashlib.sha256(b"".join(d.id.encode() + b"\0" + d.text.encode() + b"\0" for d in corpus.documents))
    assert corpus.fingerprint == digest.hexdigest()


def test_a_text_that_stands_twice_is_read_once(tmp_path):
    corpus = load_corpus(write(tmp_path / "a.jsonl", ["a", "b", "a ", "c", "b"]))
    assert sorted(d.text for d in corpus.documents) == ["a", "b", "c"]


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_no_embedded_text_is_in_two_splits(name):
    corpus = load_corpus(name)
    splits = [{d.text.strip() for d in corpus.split(split)} for split in ("train", "validation", "test")]
    assert sum(map(len, splits)) == len(set.union(*splits))


def test_empty_documents_are_left_out(tmp_path):
    assert len(load_corpus(write(tmp_path / "a.jsonl", ["a", " \n", "b", "", "c"])).documents) == 3


def test_a_row_without_text_is_not_read_as_a_word(tmp_path):
    """``nan`` or ``None`` must not become a document; an empty cell of a .csv is an empty document."""
    frame = pd.DataFrame({"text": ["a", None, "c", "d"]})
    frame.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"every row of .* needs a 'text' field"):
        load_corpus(str(tmp_path / "a.parquet"))
    frame.to_csv(tmp_path / "a.csv")
    assert [d.text for d in load_corpus(str(tmp_path / "a.csv")).documents] == ["a", "c", "d"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".txt"])
def test_rare_line_separators_do_not_end_a_row(tmp_path, suffix):
    texts = ["a\u2028b", "c\x85d", "e\x0cf", "g"]
    assert [d.text for d in load_corpus(write(tmp_path / f"a{suffix}", texts)).documents] == texts


def test_a_long_document_in_a_csv(tmp_path):
    """Python's csv refuses fields above 131,072 characters unless told otherwise."""
    texts = ["x" * 200_000, "b", "c"]
    assert [d.text for d in load_corpus(write(tmp_path / "a.csv", texts)).documents] == texts


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("a.csv", "title\nx\ny\nz\n", "needs a 'text' field; the first row has: title"),
        ("a.jsonl", '"x"\n"y"\n', "needs a 'text' field; the first row has: str"),
        ("a.jsonl", "not json", "cannot be read as .jsonl"),
        ("a.parquet", "not parquet", "cannot be read as .parquet"),
        ("a.txt", "", "has 0 non-empty document"),
        ("a.txt", "only one", "has 1 non-empty document"),
        ("a.csv", "", "has 0 non-empty document"),
    ],
)
def test_bad_files(tmp_path, name, text, rule):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_corpus(str(path))
    assert rule in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
def test_text_that_is_not_utf_8(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes("text\ndéjà".encode("latin-1"))
    with pytest.raises(UserError, match=r"is not UTF-8 \(byte 6: .*iconv"):
        load_corpus(str(path))


def test_a_byte_order_mark_does_not_hide_the_text_column(tmp_path):
    """As Excel writes CSV."""
    path = tmp_path / "a.csv"
    path.write_bytes("\ufefftext\na\nb\nc\n".encode())
    assert [d.text for d in load_corpus(str(path)).documents] == ["a", "b", "c"]


def test_unknown_names():
    with pytest.raises(UserError, match=r"unknown data set .moby_dik.; did you mean moby_dick\?"):
        load_corpus("moby_dik")
    with pytest.raises(UserError, match=r"data file not found: nowhere\.csv"):
        load_corpus("nowhere.csv")
