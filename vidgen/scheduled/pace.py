"""One long-lived process that ticks: on a grid of the steady clock, through failures, until it is told to stop.

The wall clock may jump as it likes. Refuses to know what a tick does.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable

from vidgen.errors import UserError
from vidgen.store.epochs import Held

FIRST_BACKOFF = 60.0
LONGEST_BACKOFF = 3600.0
HELD, USAGE, CRASHED, INTERRUPTED = 75, 2, 1, 130
FAILED = (CRASHED, USAGE, 4)
"""Exit codes of a tick after which the next one is brought forward or put off: a mistake, a crash, a breaker."""


def every(
    seconds: float,
    tick: Callable[[], int],
    *,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Ticks now and then at start + k x `seconds`, passing over those that a long tick has slept through. After a tick
    that failed the next comes in 1, 2, 4, ... minutes, at most an hour (or `seconds`, if that is longer). Returns
    130 once a tick does, or is interrupted."""
    start, failures = clock(), 0
    while True:
        try:
            code = tick()
        except KeyboardInterrupt:
            return INTERRUPTED
        except Held as held:
            say(str(held))
            code = HELD
        except UserError as error:
            say(f"error: {error}")
            code = USAGE
        except Exception:  # whatever it is, the next tick may do better
            say(f"error: the tick failed\n{traceback.format_exc().rstrip()}")
            code = CRASHED
        if code == INTERRUPTED:
            return INTERRUPTED
        failures = failures + 1 if code in FAILED else 0
        now = clock()
        if failures:
            wait = min(FIRST_BACKOFF * 2 ** min(failures - 1, 20), max(LONGEST_BACKOFF, seconds))
            say(f"tick ended with {code}, failure {failures} in a row; the next in {wait:,.0f} s")
        else:
            wait = start + (math.floor((now - start) / seconds) + 1) * seconds - now
        try:
            sleep(max(0.0, wait))
        except KeyboardInterrupt:
            return INTERRUPTED
