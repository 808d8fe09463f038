"""The live progress display: trials, steps, loss, tokens/s, time left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from experiments.harness.record import TrialSpec, record_path
from experiments.harness.worker import PROGRESS_FILE

_STALE_SEC = 120


class Progress:
    """Shows a campaign while workers run it, by reading what they write: records and progress files."""

    def __init__(self, specs: Sequence[TrialSpec], results: Path, runs: Path) -> None:
        self._specs = specs
        self._results = results
        self._runs = runs
        self._began = time.monotonic()
        self._done_before = len(self._done())

    def follow(self, console: Console, running: Callable[[], bool]) -> None:
        """Refresh until no worker runs; on a pipe, print one line per finished trial instead."""
        if not console.is_terminal:
            self._follow_plainly(console, running)
            return
        with Live(self.render(), console=console, refresh_per_second=2, transient=True) as live:
            while running():
                live.update(self.render())
                time.sleep(0.5)

    def _follow_plainly(self, console: Console, running: Callable[[], bool]) -> None:
        seen = self._done()
        while running():
            time.sleep(0.5)
            done = self._done()
            for spec in self._specs:
                if spec.trial_id in done - seen:
                    console.print(f"{len(done)}/{len(self._specs)} trials: {label(spec)} finished", highlight=False)
            seen = done

    def render(self) -> Group:
        """One frame: a bar over all trials, then a line for each that runs."""
        done = self._done()
        active = [(spec, p) for spec in self._specs if spec.trial_id not in done and (p := self._progress(spec))]
        share = sum(p["step"] / max(1, p["total"]) for _, p in active)
        finished_here = len(done) - self._done_before + share
        elapsed = time.monotonic() - self._began
        left = "estimating time left"
        if finished_here > 0.05:
            seconds = elapsed / finished_here * (len(self._specs) - len(done) - share)
            left = f"about {timedelta(seconds=round(seconds))} left"
        head = Table.grid(padding=(0, 1))
        head.add_row(
            f"{len(done)}/{len(self._specs)} trials",
            ProgressBar(total=len(self._specs), completed=len(done) + share, width=30),
            left,
            Text("Ctrl-C stops and keeps everything", style="dim"),
        )
        table = Table.grid(padding=(0, 2))
        for spec, p in active:
            table.add_row(
                label(spec),
                str(p.get("phase", "")),
                f"step {p['step']}/{p['total']}",
                f"loss {p['loss']:.3f}" if p.get("loss") is not None else "",
                f"{p['tokens_per_second']:.0f} tokens/s" if p.get("tokens_per_second") else "",
            )
        return Group(head, table)

    def _done(self) -> set[str]:
        return {spec.trial_id for spec in self._specs if record_path(self._results, spec).exists()}

    def _progress(self, spec: TrialSpec) -> dict[str, Any] | None:
        try:
            text = (self._runs / spec.experiment / spec.trial_id / PROGRESS_FILE).read_text()
        except OSError:
            return None
        progress: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
        return progress if time.time() - progress["time"] < _STALE_SEC else None


def label(spec: TrialSpec) -> str:
    """``main constant 200 seed 0``."""
    return " ".join([*(str(v) for v in spec.factors.values()), f"seed {spec.seed}"])
