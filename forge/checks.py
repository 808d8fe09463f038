"""Checks of options that several techniques share."""

from __future__ import annotations

from numbers import Integral


def check_whole(name: str, value: object, at_least: int = 1, *, at_most: int | None = None, hint: str = "") -> None:
    """Raise ValueError unless ``value`` is a whole number (no bool) in the range; ``hint`` ends the message."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if whole and at_least <= value and (at_most is None or value <= at_most):  # type: ignore[operator]
        return
    limit = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    raise ValueError(f"{name} must be a whole number {limit}, got {value!r}" + (f"; {hint}" if hint else ""))
