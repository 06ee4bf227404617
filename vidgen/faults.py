"""Named points before and after every durable act, where a test can kill, stop or fail the process.

Not armed, a point costs one look at the environment. Refuses to know what the acts are: their names stand where they
are done, `tests/crash/points.py` reads them off the source.

VIDGEN_FAULTS is a comma-separated list of `point:count:action[:mark]`. At the count-th time that this process reaches
the point it does the action: `kill` (SIGKILL of itself), `stop` (SIGSTOP of itself) or the name of an errno (`ENOSPC`),
which is raised as an OSError. `mark` is a file that is created first; who finds it there goes on, so that an action
happens once however many processes are armed.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections import Counter
from types import TracebackType

VARIABLE = "VIDGEN_FAULTS"
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_reached: Counter[str] = Counter()
_lock = threading.Lock()


def reached(point: str) -> None:
    """Does what a test armed this point with; nothing otherwise."""
    armed = os.environ.get(VARIABLE)
    if armed:
        _count(point, armed)


class around:
    """The points `name.before` and `name.after` of a durable act; the second is not reached if the act fails."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        reached(f"{self.name}.before")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            reached(f"{self.name}.after")


def _count(point: str, armed: str) -> None:
    with _lock:
        _reached[point] += 1
        times = _reached[point]
    for fault in armed.split(","):
        name, count, action, *mark = fault.split(":", 3)
        if name == point and int(count) == times and all(_first(path) for path in mark):
            _act(point, action)


def _first(mark: str) -> bool:
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _act(point: str, action: str) -> None:
    if action in _SIGNALS:
        # To this thread: one sent to the process may reach another first, while this one goes on.
        signal.pthread_kill(threading.get_ident(), _SIGNALS[action])
    else:
        number = getattr(errno, action)
        raise OSError(number, f"{os.strerror(number)} (asked for at {point})")
