"""Numbers as text: bytes, durations, shares, windows, and the parameters of a candidate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def size(count: float) -> str:
    """Return a number of bytes: `1.2 GiB`, `35.0 MiB`."""
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / unit:.1f} {name}"


def duration(seconds: float) -> str:
    """Return a measured time: `0.01 s`, `24.6 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s"


def rough_duration(seconds: float, digits: int = 0) -> str:
    """Return a time in its largest unit: `40 s`, `12 min`, `3.5 h`, `2.1 days`.

    Args:
        seconds: The time.
        digits: Decimals where it is shown in seconds.
    """
    for unit, name, decimals in ((86400, "days", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.{decimals}f} {name}"
    return f"{seconds:.{digits}f} s"


def number(value: float, digits: int = 6) -> str:
    """Return a number to some significant digits: `0.000574979`, `24.31`, `inf`."""
    return f"{value:.{digits}g}"


def percent(value: float, digits: int = 1) -> str:
    """Return a share as per cent: `70.0%`."""
    return f"{value:.{digits}%}"


def parameters(values: Mapping[str, Any]) -> str:
    """Return a candidate's parameters: `λ = 0.08`."""
    return ", ".join(
        f"{'λ' if name == 'lam' else name} = {number(x) if isinstance(x, float) else x}"
        for name, x in values.items()
    )


def begun_with(bos: str | None) -> str:
    """Return what follows a number of windows: `, each begun with '<s>'`, or nothing."""
    return "" if bos is None else f", each begun with '{bos}'"


def windows(data: Mapping[str, Any]) -> str:
    """Return what a report's `data` is: `8 windows of 32 tokens, each begun with '<s>', from x`.

    Args:
        data: The entry of the report.
    """
    begun = begun_with(data.get("bos"))
    packed = "packed documents of " if data.get("packed") else ""
    comma = "," if begun else ""
    how = f"{data['windows']} windows of {data['length']} tokens{begun}{comma}"
    return f"{how} from {packed}{data['source']}"
