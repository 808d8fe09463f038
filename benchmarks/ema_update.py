"""Time of one EMA update: forge beside torch, timm, ema-pytorch and diffusers, and the memory-traffic floor.

    python benchmarks/ema_update.py --threads 1

The floor is measured with kernels that stream as many bytes, by the same mix of reads and writes, over flat fp32
buffers of the model's size: ``lerp_`` (reads weights and average, writes the average: 12 bytes per parameter) for one
decay, and for each further decay ``mul_`` (reads and writes an average: 8 bytes), as if the weights were read from
memory only once: 28 bytes for three.

The others come with ``pip install "transformers-forge[benchmark]"``; one that is missing is shown as missing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from timing import Update, build_model, measure, median_interval, paired_ratio

if TYPE_CHECKING:
    from torch import nn

DECAYS = (0.99, 0.999, 0.9999)
OURS_1, OURS_3 = "forge, 1 decay", "forge, 3 decays"
SWA_1, SWA_3 = "torch swa_utils", "torch swa_utils, 3 of them"
FLOOR_1, FLOOR_3 = "floor: stream 12 B/parameter", "floor: stream 28 B/parameter"


@dataclass(frozen=True)
class Settings:
    """Compare the time of one EMA update with other libraries and with the memory-traffic floor."""

    model_size: Literal["smollm2-135m", "tiny"] = "smollm2-135m"
    """Shapes of the model."""
    threads: int = 1
    """CPU threads of torch."""
    rounds: int = 15
    """Measured rounds; each runs every contender once."""
    device: str = "cpu"
    """Where the model lives."""
    json: Path | None = None
    """File for the figures, in milliseconds."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.rounds < 6:
            raise ValueError(f"rounds must be at least 6 for an interval of the median, got {self.rounds}")


def floors(parameters: int, device: str) -> dict[str, Update]:
    """Streaming kernels with the traffic of one and of three averages."""
    import torch

    average, weights = (torch.ones(parameters, device=device) for _ in range(2))

    def three() -> None:
        average.lerp_(weights, 1e-3)
        average.mul_(1.0)
        average.mul_(1.0)

    return {FLOOR_1: lambda: average.lerp_(weights, 1e-3), FLOOR_3: three}


def ours(model: nn.Module) -> dict[str, Update]:
    from forge.ema import EMAModel

    return {OURS_1: EMAModel(model, DECAYS[1]).update, OURS_3: EMAModel(model, DECAYS).update}


def swa_utils(model: nn.Module) -> dict[str, Update]:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    averaged = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) for decay in DECAYS]

    def update_all() -> None:
        for one in averaged:
            one.update_parameters(model)

    single = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAYS[1]))
    return {SWA_1: partial(single.update_parameters, model), SWA_3: update_all}


def timm(model: nn.Module) -> dict[str, Update]:
    """Without buffers: with them timm goes by the state dict, where tied weights are averaged twice a step."""
    ema = timm_model_ema().ModelEmaV3(model, decay=DECAYS[1], foreach=True, exclude_buffers=True)
    return {"timm": partial(ema.update, model)}


def timm_model_ema() -> ModuleType:
    """``timm.utils.model_ema`` by itself where the whole of timm needs a torchvision that is not installed."""
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'timm'", name="timm")
    path = Path(found.submodule_search_locations[0]) / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} must be a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def ema_pytorch(model: nn.Module) -> dict[str, Update]:
    from ema_pytorch import EMA

    options = {"update_every": 1, "update_after_step": 0, "min_value": DECAYS[1], "include_online_model": False}
    return {"ema-pytorch": EMA(model, beta=DECAYS[1], use_foreach=True, **options).update}


def diffusers(model: nn.Module) -> dict[str, Update]:
    from diffusers.training_utils import EMAModel

    ema = EMAModel(model.parameters(), decay=DECAYS[1], min_decay=DECAYS[1], foreach=True)
    return {"diffusers": lambda: ema.step(model.parameters())}


def contenders(model: nn.Module) -> tuple[dict[str, Update], dict[str, str]]:
    """Update functions by name, and why the rest cannot run."""
    updates, missing = ours(model) | swa_utils(model), {}
    for name, build in {"timm": timm, "ema-pytorch": ema_pytorch, "diffusers": diffusers}.items():
        try:
            updates |= build(model)
        except ModuleNotFoundError as error:
            absent = (error.name or name).split(".")[0]
            if absent.replace("_", "-") == name:
                missing[name] = f"not installed: pip install {name}"
            else:
                missing[name] = f"cannot be imported: needs {absent}: pip install {absent}"
    return updates, missing


def verdicts(milliseconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Ratios beside their targets; met if the target lies above the median or inside its interval."""
    others = [n for n in milliseconds if n not in (OURS_1, OURS_3, SWA_3, FLOOR_1, FLOOR_3)]
    fastest = min(others, key=lambda name: statistics.median(milliseconds[name]))
    rows = []
    for over, under, target in [
        (OURS_1, fastest, 1.0),
        (OURS_3, SWA_3, 0.8),
        (OURS_3, FLOOR_3, 1.2),
    ]:
        ratio, interval = paired_ratio(milliseconds[over], milliseconds[under])
        met = "met" if ratio <= target else "met within noise" if interval[0] <= target else "missed"
        rows.append(
            {"ratio of": over, "to": under, "median": ratio, "interval": interval, "target": target, "met": met}
        )
    return rows


def report(
    milliseconds: dict[str, list[float]], missing: dict[str, str], parameters: int, settings: Settings
) -> dict[str, Any]:
    """Print both tables and return what they show."""
    import torch
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    title = (
        f"One EMA update of {settings.model_size}, {parameters:,} fp32 parameters, {torch.get_num_threads()} threads"
    )
    table = Table("update", "median ms", "95 % interval", "GB/s moved", title=f"{title}, torch {torch.__version__}")
    for name, values in sorted(milliseconds.items(), key=lambda item: statistics.median(item[1])):
        median, (low, high) = statistics.median(values), median_interval(values)
        moved = {FLOOR_1: 12, FLOOR_3: 28}.get(name)
        speed = f"{moved * parameters / median / 1e6:.1f}" if moved else ""
        table.add_row(name, f"{median:.1f}", f"{low:.1f} … {high:.1f}", speed)
    for name, reason in missing.items():
        table.add_row(name, reason, "", "")
    console.print(table)

    rows = verdicts(milliseconds)
    table = Table("ratio of", "to", "median", "95 % interval", "target", "", title="Targets (ratios paired in rounds)")
    for row in rows:
        low, high = row["interval"]
        figures = (f"{row['median']:.3f}", f"{low:.3f} … {high:.3f}", f"≤ {row['target']}")
        table.add_row(row["ratio of"], row["to"], *figures, row["met"])
    console.print(table)
    plan = {key: str(value) for key, value in asdict(settings).items() if key != "json"}
    return {"settings": plan, "parameters": parameters, "ms": milliseconds, "missing": missing, "targets": rows}


def main(settings: Settings) -> None:
    """Measure, print and, where asked, store the figures."""
    import torch

    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    model = build_model(settings.model_size, settings.device)
    parameters = sum(p.numel() for p in model.parameters())
    updates, missing = contenders(model)
    updates |= floors(parameters, settings.device)
    if os.getloadavg()[0] > 0.5:
        print(f"the load average is {os.getloadavg()[0]:.1f}: the figures below are of a busy machine", file=sys.stderr)
    with torch.no_grad():
        milliseconds = measure(updates, settings.rounds, settings.device)
    figures = report(milliseconds, missing, parameters, settings)
    if settings.json is not None:
        settings.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Settings))
