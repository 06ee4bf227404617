"""Whose turn it is: one tick at a time holds the schedule, by the same epochs and beats as a driver holds its run.

The turn saves work; what keeps two ticks from making a row twice is that a plan is created once. Refuses to know what
a tick does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from vidgen.errors import InfrastructureError
from vidgen.store import epochs
from vidgen.store.objects import Objects


class Turn:
    """Held from `take` to `release`, a thread beating for it. `vidgen stop OUTPUT` is heard at a beat: `stopping` is
    then set and the run that is being driven is asked to stop."""

    def __init__(self, lease: epochs.Lease, every: float = epochs.BEAT_SECONDS) -> None:
        self.lease, self.every = lease, every
        self.stopping = False
        self.driven: Objects | None = None
        """The run that is being driven."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beats, name="turn", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises Held if another tick took the turn."""
        self.lease.check()

    def release(self) -> None:
        self._over.set()
        self._thread.join()
        self.lease.release()

    def _beats(self) -> None:
        while not self._over.wait(self.every):
            try:
                self.lease.beat()
                if self.lease.stop_requested():
                    self.stopping = True
                    if self.driven is not None:
                        epochs.request_stop(self.driven)
            except (InfrastructureError, OSError, epochs.Held):
                continue  # the next beat tries again, and whoever loses the turn learns it from `check`


def take(root: Objects, lease: float, takeover: bool, overlap: str, say: Callable[[str], None]) -> Turn | None:
    """The turn; None if another tick has it and `overlap` is join. Raises Held if it has it and `overlap` is skip."""
    try:
        return Turn(epochs.acquire(root, lease=lease, takeover=takeover))
    except epochs.Held as held:
        if overlap == "skip":
            raise epochs.Held(f"the last tick still runs, this one is skipped ({held})") from held
        say(f"another tick runs ({held}); this one joins in with what it has not planned")
        return None
