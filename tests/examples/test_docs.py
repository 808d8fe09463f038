"""The code of the pages in ``docs/`` runs, their links lead somewhere, and figures of the EMA page are the records'."""

from __future__ import annotations

import ast
import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.estimands import per_seed_values
from analysis.load import load_campaigns
from experiments.harness.averaging import AveragingCurve
from experiments.harness.claims import SelectedReduction, Selector

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


def page_name(page: Path) -> str:
    return page.stem


def code_blocks(text: str) -> list[tuple[int, str]]:
    """Number of the first line and code of each Python block."""
    found = re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: block.start(1)].count("\n") + 1, block[1]) for block in found]


def reader_namespace(model_folder: Path) -> dict[str, Any]:
    """What a reader of the pages has before the first block: a model, data, a Trainer."""
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

    from forge import get_preset

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, use_cache=False)
    ids = torch.randint(0, 256, (16, 32)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    dataloader = DataLoader(data, batch_size=4, collate_fn=default_data_collator)
    batch = next(iter(dataloader))
    args = TrainingArguments(output_dir="./output", max_steps=2, per_device_train_batch_size=4, use_cpu=True)
    return {
        "name": str(model_folder),
        "model": model,
        "tokenizer": AutoTokenizer.from_pretrained(model_folder),
        "data": data,
        "dataset": data,
        "train_dataset": data,
        "eval_dataset": data,
        "dataloader": dataloader,
        "batch": batch,
        "loss": model(**batch).loss,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "args": args,
        "Trainer": Trainer,
        "trainer": Trainer(model, args, train_dataset=data, eval_dataset=data),
        "get_preset": get_preset,
    }


@pytest.mark.parametrize("page", WITH_CODE, ids=page_name)
def test_code_runs(page: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of a page, one after the other in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace, text = reader_namespace(model_folder), page.read_text()
    blocks = code_blocks(text)
    assert len(blocks) == text.count("```python"), "a block is indented or not closed, and would not be run"
    for line, code in blocks:
        tree = ast.parse(code, filename=str(page))
        ast.increment_lineno(tree, line - 1)
        exec(compile(tree, str(page), "exec"), namespace)


def test_code_blocks_are_found_with_their_lines() -> None:
    assert code_blocks("a\n```python\nx = 1\n```\nb\n```bash\nls\n```\n```python\ny\n```\n") == [
        (3, "x = 1\n"),
        (10, "y\n"),
    ]


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "examples" / "README.md"], ids=lambda page: f"{page.parent.name}-{page.stem}"
)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == {page.name for page in PAGES} - {"README.md"}


def ema_rows() -> list[dict[str, str]]:
    with (ROOT / "results" / "tables" / "ema_ablation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def percent(share: str) -> str:
    return f"{float(share) * 100:+.2f}".replace("-", "−")


def test_figures_of_the_ema_page_are_those_of_the_records() -> None:
    known = {
        (
            f"{int(row['steps']):,}",
            row["schedule"],
            row["arm"],
            percent(row["relative_reduction"]),
            percent(row["relative_reduction_low"]),
            percent(row["relative_reduction_high"]),
        )
        for row in ema_rows()
        if row["relative_reduction"]
    }
    pattern = r"\| [^|]*, ([\d,]+) \| (\w+) \| ([^|]+) \| [^|]+ \| (\S+) % \[(\S+); (\S+)\] \|"
    shown = re.findall(pattern, (ROOT / "docs" / "ema.md").read_text())
    assert len(shown) == 7
    for steps, schedule, decay, *figures in shown:
        arm = "ema_optimal" if "optimal" in decay else f"ema_{decay}"
        assert (steps, schedule, arm, *figures) in known


@pytest.mark.parametrize(
    ("condition", "schedule", "said"),
    [
        ("base", "constant", "{} % in the base cell"),
        ("high_lr", "constant", "{} % with a rate five times as high"),
        ("long", "constant", "{} % in a run four times as long"),
        ("small_data", "constant", "{} % where 384 blocks"),
        ("small_data", "cosine", "Under cosine they gain {} % on little data"),
        ("large_batch", "constant", "{} % with batches four times as large"),
    ],
)
def test_gains_in_the_cells_are_those_of_the_records(condition: str, schedule: str, said: str) -> None:
    """Both sides at their best checkpoint on validation, as in the claims."""
    *_, campaign = load_campaigns(ROOT / "results", "ema_conditions")[0]
    where: Selector = {"track": "cells", "condition": condition, "schedule": schedule}
    gain = SelectedReduction("eval_loss", AveragingCurve().arms, ({"arm": "raw"},), where)
    mean = per_seed_values(gain, campaign.observations).mean()
    page = " ".join((ROOT / "docs" / "ema.md").read_text().split())
    assert said.format(f"{100 * mean:.1f}") in page


def test_no_average_beat_the_raw_weights_under_cosine() -> None:
    """As the EMA page says."""
    cosine = [row for row in ema_rows() if row["schedule"] == "cosine" and row["arm"].startswith("ema_")]
    assert len(cosine) > 10
    assert all(float(row["relative_reduction"]) < 0 for row in cosine)
