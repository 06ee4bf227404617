"""A log as JSON lines: one object a line, the same keys in each, for whoever collects them.

    {"time": "2026-05-01T06:00:00.123+00:00", "level": "warning", "run": "clips", "item": "0123...", "replica": "r3",
     "attempt": 2, "message": "the attempt failed (item): ..."}

What does not concern an item, a replica or an attempt has null there. Refuses to know what happens.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone

LEVELS = ("debug", "info", "warning", "error")


def line(
    message: str,
    level: str = "info",
    *,
    run: str | None = None,
    item: str | None = None,
    replica: str | None = None,
    attempt: int | None = None,
) -> str:
    """One line, without its end. `run` is the run's name, `item` an item id."""
    assert level in LEVELS, level
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    values = {"time": now, "level": level, "run": run, "item": item, "replica": replica, "attempt": attempt}
    return json.dumps({**values, "message": message})
