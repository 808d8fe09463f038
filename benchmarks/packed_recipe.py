"""Tokens trained on per second: our packed recipe beside the guide's padded one, same text, same model.

    python benchmarks/packed_recipe.py --threads 2

The guide pads or cuts every document to ``max_length`` and trains in fp32. Ours joins the documents, cuts them into
full blocks of that length (attention crosses the borders of documents), and computes under bf16 autocast. The two
mixtures are measured too, which tells the part of packing from that of bf16. A step is forward, backward, clipping and
AdamW, as the ``Trainer`` takes it; attention is SDPA everywhere, the default that the guide does not change.

A token counts if it has a loss: padding does not, nor does the first token of a row. Every row has the same shape, so
time is measured on some batches and the tokens of a batch are the mean over all of the text. How much of it is
padding is a property of the text: the last table has that share for each embedded corpus.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from timing import Update, build_model, measure, median_interval, paired_ratio

from experiments.harness.data import EMBEDDED, Document, Tokenizer, load_corpus, pack

if TYPE_CHECKING:
    import torch
    from torch import nn

Batch = dict[str, "torch.Tensor"]

SEED, OURS = "padded, fp32 (the guide)", "packed, bf16 (ours)"
PACKED_FP32, PADDED_BF16 = "packed, fp32", "padded, bf16"
TARGET = 3.0
BATCHES = 8
"""Different batches that each recipe goes round, spread over the text."""


@dataclass(frozen=True)
class Settings:
    """Compare tokens trained on per second of the packed recipe and of the padded one."""

    model_size: Literal["smollm2-135m", "tiny"] = "smollm2-135m"
    """Shapes of the model (random weights); ``tiny`` reads bytes and needs no download of a tokenizer."""
    dataset: str = "moby_dick"
    """Text: an embedded name, a local file or a hub id."""
    max_length: int = 2048
    """Tokens of a row; the guide's."""
    batch_size: int = 1
    """Rows of a step. The guide's 4 takes four times as long; a larger batch spreads the optimizer's time thinner."""
    threads: int = 2
    """CPU threads of torch."""
    rounds: int = 6
    """Measured rounds; each takes one step of every recipe."""
    device: str = "cpu"
    """Where the model lives."""
    json: Path | None = None
    """File for the figures, in milliseconds."""

    def __post_init__(self) -> None:
        if self.max_length < 2 or self.batch_size < 1 or self.threads < 1:
            raise ValueError(
                "max_length must be at least 2, batch_size and threads at least 1, "
                f"got {self.max_length}, {self.batch_size} and {self.threads}"
            )
        if self.rounds < 6:
            raise ValueError(f"rounds must be at least 6 for an interval of the median, got {self.rounds}")


@dataclass(frozen=True)
class Text:
    """What the guide's recipe makes of a text."""

    padding_share: float
    """Share of all positions that hold padding."""
    cut_share: float
    """Share of the text's tokens that truncation never lets the model see."""
    targets_per_row: float
    """Tokens with a loss in a row, mean over the text."""


def tokenizer_of(model_size: str) -> Any:
    from experiments.harness.models import TINY, load_tokenizer

    tokenizer = load_tokenizer(TINY if model_size == "tiny" else model_size)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def padded_text(documents: list[Document], tokenizer: Tokenizer, max_length: int) -> Text:
    """Shares of padding and of lost text when every document is padded or cut to ``max_length``."""
    encoded = tokenizer([d.text for d in documents], verbose=False)["input_ids"]
    kept = [min(len(ids), max_length) for ids in encoded]
    return Text(
        padding_share=1 - statistics.mean(kept) / max_length,
        cut_share=1 - sum(kept) / sum(map(len, encoded)),
        targets_per_row=statistics.mean(max(0, tokens - 1) for tokens in kept),
    )


def padded_batches(documents: list[Document], tokenizer: Any, settings: Settings) -> list[Batch]:
    """The guide's: one document a row, no labels for padding."""
    from transformers import DataCollatorForLanguageModeling

    texts = [d.text for d in spread(documents, BATCHES * settings.batch_size)]
    encoded = tokenizer(texts, truncation=True, max_length=settings.max_length, padding="max_length")
    rows = [{key: values[i] for key, values in encoded.items()} for i in range(len(texts))]
    return batched(DataCollatorForLanguageModeling(tokenizer, mlm=False), rows, settings)


def packed_batches(documents: list[Document], tokenizer: Tokenizer, settings: Settings) -> list[Batch]:
    """Ours: full blocks, every token a label."""
    import torch

    blocks = pack(documents, tokenizer, settings.max_length).spread(BATCHES * settings.batch_size)

    def collate(rows: list[Any]) -> Batch:
        ids = torch.stack([torch.from_numpy(row) for row in rows])
        return {"input_ids": ids, "labels": ids}

    return batched(collate, list(blocks.input_ids), settings)


def spread(documents: list[Document], count: int) -> list[Document]:
    """At most ``count`` documents, evenly spread."""
    return documents[:: max(1, len(documents) // count)][:count]


def batched(collate: Any, rows: list[Any], settings: Settings) -> list[Batch]:
    size = settings.batch_size
    whole = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
    if not whole:
        raise ValueError(f"batch_size must be at most the {len(rows)} rows of {settings.dataset}, got {size}")
    return [{k: v.to(settings.device) for k, v in collate(some).items()} for some in whole]


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], precision: Literal["fp32", "bf16"]
) -> None:
    """One optimizer step on the next batch; bf16 is autocast over fp32 weights."""
    import torch

    batch = next(batches)
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def recipes(model: nn.Module, documents: list[Document], tokenizer: Any, settings: Settings) -> dict[str, Update]:
    """A training step of each of the four; they share the model and the optimizer."""
    import torch

    padded, packed = (make(documents, tokenizer, settings) for make in (padded_batches, packed_batches))
    step = partial(training_step, model, torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True))
    return {
        SEED: partial(step, cycle(padded), "fp32"),
        PACKED_FP32: partial(step, cycle(packed), "fp32"),
        PADDED_BF16: partial(step, cycle(padded), "bf16"),
        OURS: partial(step, cycle(packed), "bf16"),
    }


def speed_ups(milliseconds: dict[str, list[float]], targets: dict[str, float]) -> list[dict[str, Any]]:
    """Ratios of tokens per second, paired within rounds: ours over the guide's, and one change at a time."""
    rows = []
    for over, under in [
        (OURS, SEED),
        (PACKED_FP32, SEED),
        (OURS, PADDED_BF16),
        (PADDED_BF16, SEED),
        (OURS, PACKED_FP32),
    ]:
        time, (low, high) = paired_ratio(milliseconds[under], milliseconds[over])
        tokens = targets[over] / targets[under]
        rows.append({"of": over, "to": under, "median": time * tokens, "interval": (low * tokens, high * tokens)})
    return rows


def factors(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The speed-up as packing × bf16; packing's factor is the geometric mean of packing first and packing last."""
    total, first, last = (row["median"] for row in rows[:3])
    packing = math.sqrt(first * last)
    return packing, total / packing


def report(
    milliseconds: dict[str, list[float]], targets: dict[str, float], texts: dict[str, Text], settings: Settings
) -> dict[str, Any]:
    """Print the tables and return what they show."""
    import torch
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    title = (
        f"A training step of {settings.model_size} on {settings.dataset}, batch {settings.batch_size} × "
        f"{settings.max_length} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    table = Table("recipe", "median ms", "95 % interval", "tokens with a loss", "tokens/s", title=title)
    for name, values in milliseconds.items():
        median, (low, high) = statistics.median(values), median_interval(values)
        figures = (f"{median:,.0f}", f"{low:,.0f} … {high:,.0f}", f"{targets[name]:,.0f}")
        table.add_row(name, *figures, f"{targets[name] / median * 1e3:,.1f}")
    console.print(table)

    rows = speed_ups(milliseconds, targets)
    table = Table("tokens/s of", "to", "median", "95 % interval", title="Speed-up (ratios paired in rounds)")
    for row in rows:
        low, high = row["interval"]
        table.add_row(row["of"], row["to"], f"{row['median']:.2f}", f"{low:.2f} … {high:.2f}")
    console.print(table)
    total, (_, high) = rows[0]["median"], rows[0]["interval"]
    met = "met" if total >= TARGET else "met within noise" if high >= TARGET else "missed"
    packing, bf16 = factors(rows)
    console.print(f"Target ≥ {TARGET}: {met}. {total:.2f} = packing {packing:.2f} × bf16 {bf16:.2f}.")

    columns = ("padding", "text cut off", "tokens with a loss", "packed has × as many")
    table = Table("text", *columns, title=f"A padded row of {settings.max_length}, by text")
    for name, text in texts.items():
        more = (settings.max_length - 1) / text.targets_per_row
        table.add_row(
            name, f"{text.padding_share:.1%}", f"{text.cut_share:.1%}", f"{text.targets_per_row:,.0f}", f"{more:.2f}"
        )
    console.print(table)
    plan = {key: str(value) for key, value in asdict(settings).items() if key != "json"}
    shares = {name: asdict(text) for name, text in texts.items()}
    return {"settings": plan, "ms": milliseconds, "tokens": targets, "speed_ups": rows, "met": met, "texts": shares}


def main(settings: Settings) -> None:
    """Measure, print and, where asked, store the figures."""
    import torch

    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    tokenizer = tokenizer_of(settings.model_size)
    splits = {name: load_corpus(name).split("train") for name in dict.fromkeys([settings.dataset, *EMBEDDED])}
    texts = {name: padded_text(split, tokenizer, settings.max_length) for name, split in splits.items()}
    padded = settings.batch_size * texts[settings.dataset].targets_per_row
    packed = float(settings.batch_size * (settings.max_length - 1))
    targets = {SEED: padded, PACKED_FP32: packed, PADDED_BF16: padded, OURS: packed}

    model = build_model(settings.model_size, settings.device).train()
    steps = recipes(model, splits[settings.dataset], tokenizer, settings)
    if os.getloadavg()[0] > 0.5:
        print(f"the load average is {os.getloadavg()[0]:.1f}: the figures below are of a busy machine", file=sys.stderr)
    figures = report(measure(steps, settings.rounds, settings.device), targets, texts, settings)
    if settings.json is not None:
        settings.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Settings))
