"""Checks of preset options: types, ranges, unknown names; every message has the rule, the value and the fix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


_KINDS: dict[str, tuple[str, Callable[[object], bool], str]] = {
    "float": ("a finite number", _is_number, "pass it without quotes, such as 2e-4"),
    "int": ("a whole number", _is_whole, "pass it without quotes, such as 16"),
    "bool": ("True or False", lambda value: isinstance(value, bool), "pass one of the two"),
    "str": ("a string", lambda value: isinstance(value, str), "put it in quotes"),
}
"""By annotation: what a value must be, whether it is, and the fix."""


def check_types(options: Any) -> None:
    """Refuse (ValueError) a dataclass field whose value is not of its annotated type; True is no number.

    Fields annotated otherwise than by a number, a truth value or a string are left to their own checks.
    """
    for field in fields(options):
        kind = str(field.type).removesuffix(" | None")
        optional = kind != str(field.type)
        value = getattr(options, field.name)
        if kind not in _KINDS or (optional and value is None):
            continue
        rule, is_kind, fix = _KINDS[kind]
        if not is_kind(value):
            raise ValueError(
                f"{field.name} must be {rule}{' or None' if optional else ''}, got {value!r} "
                f"({type(value).__name__}); {fix}"
            )


def check_range(name: str, value: float | None, low: float, high: float | None = None, *, above: bool = False) -> None:
    """Refuse (ValueError) a number outside [low, high]; ``above``: low itself too. None is let through."""
    if value is None or ((low < value if above else low <= value) and (high is None or value <= high)):
        return
    rule = f"{'above' if above else 'at least'} {low:g}" + (f" and at most {high:g}" if high is not None else "")
    raise ValueError(f"{name} must be {rule}, got {value!r}; choose a value in that range")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Refuse (ValueError) a name that is not among the known ones; near misses are listed."""
    known = list(known)
    if value not in known:
        close = get_close_matches(value, known, n=3)
        raise ValueError(
            f"{name} must be one of {', '.join(known)}, got {value!r}; "
            + (f"did you mean {', '.join(close)}?" if close else "choose one of these")
        )


def unknown_option(
    preset: str, option: str, known: Iterable[str], owners: Iterable[str], reason: str = ""
) -> ValueError:
    """The error for an override that a preset does not have.

    Args:
        preset: name of the preset.
        option: the unknown override.
        known: options that the preset has.
        owners: presets that do have this option.
        reason: why this preset lacks it, where that is worth saying.
    """
    rule = f"an override must be an option of the preset, got {option!r} for {preset!r}"
    if reason:
        return ValueError(f"{rule}: {reason}; leave it out")
    owners = list(owners)
    if owners:
        return ValueError(f"{rule}, which would ignore it; it belongs to {', '.join(owners)}: use one of these")
    known = sorted(known)
    if option == "warmup_ratio":
        return ValueError(f"{rule}; use warmup_steps: below 1 it is a share of the run, such as warmup_steps=0.1")
    close = get_close_matches(option, known, n=3)
    return ValueError(f"{rule}; " + (f"did you mean {', '.join(close)}?" if close else f"it has {', '.join(known)}"))
