"""How numbers are written: the one place where results are rounded.

Serves every table, figure and verdict block, so that the same number reads the same everywhere. Relative estimands
are shown as percent, shifts of a logarithm as the factors that they are; ratios, differences, and slopes, which are
exponents, as plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.harness.claims import (
    ArgBestShift,
    Difference,
    Estimand,
    ExactRatio,
    LogLogSlope,
    Proportion,
    Rate,
    Ratio,
    Region,
    bare,
)

NO_BREAK_SPACE = "\u00a0"
MINUS = "\u2212"
TIMES = f"×{NO_BREAK_SPACE}"
NOTHING = "—"
ROUNDING = 1e-12
"""What is smaller is the rounding of the arithmetic, which differs between machines: shown as zero."""


@dataclass(frozen=True)
class Style:
    """Conventions of one language."""

    decimal: str
    percent: str
    thousands: str

    def number(self, value: float, digits: int, signed: bool = False) -> str:
        """``1234.5`` → ``1 234,50``; a non-finite value is spelled out, never hidden."""
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "∞" if value > 0 else f"{MINUS}∞"
        text = f"{abs(value):,.{digits}f}"
        sign = MINUS if value < 0 and any(c in "123456789" for c in text) else "+" if signed and value > 0 else ""
        swap = str.maketrans({",": self.thousands, ".": self.decimal})
        return sign + text.translate(swap)

    def figure(self, value: float, digits: int, signed: bool = False) -> str:
        """As ``number``, with at least two significant digits: ``0.00012``, ``1.2e-07``."""
        if not math.isfinite(value) or abs(value) < ROUNDING:
            return self.number(value, digits)
        magnitude = math.floor(math.log10(abs(value)))
        if magnitude >= -5:
            return self.number(value, max(digits, 1 - magnitude), signed)
        sign = MINUS if value < 0 else "+" if signed else ""
        return sign + f"{abs(value):.1e}".replace(".", self.decimal)

    def share(self, value: float, digits: int = 2, signed: bool = False) -> str:
        """A share as percent: ``0.0123`` → ``1.23%``."""
        return self.number(100 * value, digits, signed) + self.percent

    def factor(self, shift: float) -> str:
        """A shift of a logarithm to base 10 as a factor: ``0.30103`` → ``× 2.00``."""
        return TIMES + self.figure(10**shift, 2)


ENGLISH = Style(decimal=".", percent="%", thousands=",")
RUSSIAN = Style(decimal=",", percent=f"{NO_BREAK_SPACE}%", thousands=NO_BREAK_SPACE)


def is_relative(estimand: Estimand) -> bool:
    """Whether an estimand is a share, shown as percent."""
    return not isinstance(bare(estimand), ExactRatio | Ratio | Difference | ArgBestShift | LogLogSlope)


def is_shift(estimand: Estimand) -> bool:
    """Whether an estimand is the log10 of a ratio, shown as the ratio."""
    return isinstance(bare(estimand), ArgBestShift)


def format_estimate(estimand: Estimand, value: float | None, style: Style, digits: int = 2) -> str:
    """An estimate in the unit of its estimand, with its sign where zero is the point of reference."""
    if value is None:
        return NOTHING
    if is_relative(estimand):
        return style.share(value, digits, signed=not isinstance(estimand, Rate | Proportion))
    if is_shift(estimand):
        return style.factor(value)
    return style.figure(value, 3, signed=isinstance(bare(estimand), Difference | LogLogSlope))


def format_interval(estimand: Estimand, interval: tuple[float, float] | None, style: Style) -> str:
    """``[low; high]`` in the unit of the estimand."""
    if interval is None:
        return NOTHING
    low, high = (format_estimate(estimand, bound, style) for bound in interval)
    return f"[{low}; {high}]"


def format_region(estimand: Estimand, region: Region, style: Style) -> str:
    """Where the claim is true: ``≥ 1 %``, ``≥ × 3`` or ``[−0,1; 0,1]``."""
    low, high = (_bound(estimand, bound, style) for bound in (region.low, region.high))
    if math.isinf(region.low) and math.isinf(region.high):
        return "∈ ℝ"
    if math.isinf(region.high):
        return f"≥{NO_BREAK_SPACE}{low}"
    if math.isinf(region.low):
        return f"≤{NO_BREAK_SPACE}{high}"
    return f"[{low}; {high}]"


def format_span(value: float, style: Style) -> str:
    """A share that may be tiny or almost one, to the tenth of a percent."""
    if 0 < value < 0.0005:
        return f"<{NO_BREAK_SPACE}{style.share(0.001, 1)}"
    return style.share(value, 1)


def format_count(value: float, style: Style) -> str:
    """Steps, bytes, tokens: whole from ten upwards, else two decimals without idle zeros."""
    if value >= 10 or value == int(value):
        return style.number(value, 0)
    return style.number(value, 2).rstrip("0").rstrip(style.decimal)


def _bound(estimand: Estimand, bound: float, style: Style) -> str:
    """A bound is a declared constant: shown with four significant digits, without idle zeros."""
    if math.isinf(bound):
        return style.number(bound, 0)
    if is_shift(estimand):
        return TIMES + _significant(10**bound, style)
    if is_relative(estimand):
        return _significant(100 * bound, style) + style.percent
    return _significant(bound, style)


def _significant(value: float, style: Style) -> str:
    """``0.333333`` → ``0.3333``, ``3.0`` → ``3``, ``0.00001`` → ``1e-05``."""
    return (MINUS if value < 0 else "") + f"{abs(value):.4g}".replace(".", style.decimal)


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool], padded: bool = True
) -> str:
    """A Markdown table; ``right`` marks the right-aligned columns.

    Padded, it reads well as plain text; unpadded, a change of one cell changes one line.
    """
    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in (header, *rows)]
    widths = [max(3, *(len(text) for text in column)) if padded else 3 for column in zip(*cells, strict=True)]
    rule = ["-" * (width - 1) + ":" if r else "-" * width for width, r in zip(widths, right, strict=True)]
    lines = [
        [
            (text.rjust(w) if r else text.ljust(w)) if padded else text
            for text, w, r in zip(row, widths, right, strict=True)
        ]
        for row in (cells[0], rule, *cells[1:])
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
