"""How values are written for a person."""

from __future__ import annotations

UNITS = ("B", "KB", "MB", "GB", "TB")


def duration(seconds: float) -> str:
    """1:02:03, 4:05 or 6 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def seconds(value: float) -> str:
    """0.034 s, 4.2 s, then as `duration`: of things that may be short."""
    return f"{value:.2g} s" if value < 10 else duration(value)


def size(count: float) -> str:
    """512 B, 3.4 KB, 12 MB, 1.5 TB: decimal units."""
    place = 0
    while count >= 1000 and place < len(UNITS) - 1:
        count, place = count / 1000, place + 1
    return f"{count:.3g} {UNITS[place]}"
