"""The packed-recipe benchmark counts tokens right and runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import packed_recipe

    return packed_recipe


class Letters:
    """A token a letter."""

    eos_token_id = 0

    def __call__(self, text: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in one] for one in text]}


def test_padding_cut_text_and_targets_by_hand(benchmark: ModuleType) -> None:
    from experiments.harness.data import Document

    documents = [Document(text, text) for text in ("a", "bcd", "efghijkl")]  # 1, 3 and 8 tokens, rows of 4
    text = benchmark.padded_text(documents, Letters(), 4)
    assert text.padding_share == pytest.approx(4 / 12)
    assert text.cut_share == pytest.approx(4 / 12)
    assert text.targets_per_row == pytest.approx((0 + 2 + 3) / 3)


def test_batches_have_as_many_targets_as_are_counted(benchmark: ModuleType) -> None:
    from experiments.harness.data import Document

    settings = benchmark.Settings(model_size="tiny", max_length=16, batch_size=2)
    tokenizer = benchmark.tokenizer_of("tiny")
    documents = [Document(str(i), "x" * n) for i, n in enumerate((3, 9, 16, 40))]
    counted = benchmark.padded_text(documents, tokenizer, 16).targets_per_row
    padded = benchmark.padded_batches(documents, tokenizer, settings)
    targets = [int((batch["labels"][:, 1:] != -100).sum()) for batch in padded]
    assert len(padded) == 2 and sum(targets) / 4 == counted
    packed = benchmark.packed_batches(documents, tokenizer, settings)
    assert all((batch["labels"] != -100).all() and batch["labels"].shape == (2, 16) for batch in packed)


def test_speed_up_is_a_ratio_of_tokens_per_second(benchmark: ModuleType) -> None:
    names = [benchmark.SEED, benchmark.PACKED_FP32, benchmark.PADDED_BF16, benchmark.OURS]
    milliseconds = {
        name: [ms * drift for drift in range(1, 8)] for name, ms in zip(names, (40, 40, 10, 10), strict=True)
    }
    tokens = dict(zip(names, (50.0, 100.0, 50.0, 100.0), strict=True))
    rows = benchmark.speed_ups(milliseconds, tokens)
    assert [row["median"] for row in rows] == pytest.approx([8, 2, 2, 4, 4])
    assert rows[0]["interval"] == pytest.approx((8, 8))
    assert benchmark.factors(rows) == pytest.approx((2, 4))


@pytest.mark.parametrize("wrong", [{"rounds": 5}, {"batch_size": 0}, {"max_length": 1}, {"threads": 0}])
def test_wrong_settings_are_refused_with_the_value(benchmark: ModuleType, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"must be at least .*got .*{next(iter(wrong.values()))}"):
        benchmark.Settings(**wrong)


def test_the_benchmark_runs(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    settings = {"model_size": "tiny", "dataset": "movie_sentiment", "max_length": 64, "threads": 1, "json": file}
    benchmark.main(benchmark.Settings(**settings))
    figures = json.loads(file.read_text())
    assert all(len(values) == 6 for values in figures["ms"].values()) and len(figures["ms"]) == 4
    assert figures["tokens"][benchmark.OURS] == 63 > figures["tokens"][benchmark.SEED]
    assert "Target ≥ 3.0" in capsys.readouterr().out
    assert set(figures["texts"]) == {"moby_dick", "state_of_the_union", "movie_sentiment"}
