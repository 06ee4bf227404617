"""What is half denoised is kept: when a replica saves, when it leaves off, what it goes on from, and what the driver
knows of it all.

A state is worth keeping where its item is predicted to denoise for longer than `run.save_after`. It is saved when the
replica must leave (its node goes, the run stops), and now and then if `run.save_every` asks for it. Nothing here may
harm an item: a state that cannot be written, read or used is told, and the item goes on, or begins again. Refuses to
know what is in a state (`vidgen.loop` does) and who gets the item next.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vidgen import faults
from vidgen.errors import InfrastructureError, ItemError
from vidgen.fleet.events import Event, ItemFailed, ItemSaved, Noted, Send, Work
from vidgen.store import resume
from vidgen.store.commits import Attempt
from vidgen.store.objects import Objects
from vidgen.types import Record

if TYPE_CHECKING:
    from vidgen.loop import State

ALIVE_SECONDS = 1.0
SHORT_ID = 8
"""Letters of an item id that a person reads."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Where a batch stands: the median seconds of its steps, how many it has done, and of how many. Zeros while it does
    not denoise."""

    seconds: float = 0.0
    step: int = 0
    steps: int = 0

    @property
    def whole(self) -> float:
        """Predicted seconds of all steps."""
        return self.seconds * self.steps

    @property
    def left(self) -> float:
        return self.seconds * (self.steps - self.step)


@dataclass(frozen=True, slots=True)
class Leaving:
    """A replica must leave: by `until` (monotonic seconds), or None: as soon as that loses nothing."""

    until: float | None


# ---------------------------------------------------------------- in a replica


class Keeper:
    """Saves what one replica runs, and says when to leave off. `save`, `cancelled` and `resume` are the engine's hooks,
    called by its thread; `leave` may come at any time, from another."""

    def __init__(
        self, name: str, objects: Objects, after: float, every: float | None, pace: Callable[[], Pace]
    ) -> None:
        self.name, self.objects, self.after, self.every, self.pace = name, objects, after, every, pace
        self.tell: Callable[[Event], None] = lambda event: None
        self.alive: Callable[[], None] = lambda: None
        """Called now and then while the engine waits for a state to be stored."""
        self.tail: float | None = None
        """Seconds from an item's last step to its commit, as the last one took; None before the first."""
        self._works: tuple[Work, ...] = ()
        self._start: State | None = None
        self._leaving: Leaving | None = None
        self._offered = self._tried = self._kept = False
        self._last = 0.0
        self._uploading: threading.Thread | None = None

    def leave(self, within: float | None) -> None:
        """The replica must leave within so many seconds (None: as soon as nothing is lost by it)."""
        self._leaving = Leaving(None if within is None else time.monotonic() + within)

    @property
    def leaving(self) -> bool:
        return self._leaving is not None

    def begin(self, works: tuple[Work, ...], start: State | None) -> None:
        """The engine begins these, from `start` if it is given."""
        self._works, self._start = works, start
        self._offered = self._tried = self._kept = False
        self._last = time.monotonic()

    def resume(self, requests: Sequence[Any]) -> State | None:
        return self._start if len(requests) == len(self._works) else None

    def cancelled(self) -> bool:
        """Asked before each step. Leaves off where all is kept, or where it will not be done in time anyway."""
        leaving = self._leaving
        if leaving is None:
            return False
        if self._kept:
            return True
        if leaving.until is None or not self._late():
            return False
        return self._tried or not self._offered or not self._long()

    def save(self, state: State) -> None:
        """Offered after each step: the state of the batch."""
        self._offered = True
        if len(state.latents) != len(self._works) or not self._long():
            return
        leaving = self._leaving
        if leaving is not None and (self._late() if leaving.until is not None else state.step < self.pace().steps):
            self._tried = True
            self.settle()
            self._begin_upload(state)
            self.settle()
        elif self.every is not None and time.monotonic() - self._last >= self.every and not self._busy():
            self._last = time.monotonic()
            self._begin_upload(state)

    def _begin_upload(self, state: State) -> None:
        act = partial(self._upload, state.step, self._contents(state), last=self._tried)
        self._uploading = threading.Thread(target=act, name=f"{self.name}-save", daemon=True)
        self._uploading.start()

    def settle(self) -> None:
        """Waits for a save that is on its way, so that none comes after what becomes of the item. A slow store is no
        hang."""
        while self._uploading is not None and self._busy():
            self._uploading.join(ALIVE_SECONDS)
            self.alive()

    def _busy(self) -> bool:
        return self._uploading is not None and self._uploading.is_alive()

    def _long(self) -> bool:
        return self.pace().whole > self.after

    def _late(self) -> bool:
        """Whether what runs will not be committed by the time that it must."""
        assert self._leaving is not None and self._leaving.until is not None
        pace = self.pace()
        tail = pace.seconds if self.tail is None else self.tail * len(self._works)
        return time.monotonic() + pace.left + tail > self._leaving.until

    def _contents(self, state: State) -> list[bytes]:
        return [state.item(b).to_bytes(_about(work)) for b, work in enumerate(self._works)]

    def _upload(self, step: int, contents: Sequence[bytes], last: bool) -> None:
        for work, content in zip(self._works, contents, strict=True):
            item_id = work.item.item_id
            try:
                with faults.around("state saved"):
                    self.objects.put(resume.resume_path(work.generation, item_id), content)
            except (InfrastructureError, OSError) as error:
                self.tell(Noted(self.name, f"item {item_id[:SHORT_ID]} was not saved: {error}"))
                return
            self.tell(ItemSaved(self.name, item_id, step))
        self._kept = last


def groups(
    works: Sequence[Work], objects: Objects, note: Callable[[str], None]
) -> Iterator[tuple[tuple[Work, ...], State | None]]:
    """A batch as the engine can run it: items that go on from the same step together, then those that begin."""
    alike: dict[tuple[int, frozenset[str]], list[tuple[Work, State]]] = {}
    fresh: list[Work] = []
    for work in works:
        state = _read(work, objects, note) if work.saved else None
        if state is None:
            fresh.append(work)
        else:
            alike.setdefault((state.step, frozenset(state.history)), []).append((work, state))
    for together in alike.values():
        from vidgen.loop import State

        yield tuple(work for work, _ in together), State.together([state for _, state in together])
    if fresh:
        yield tuple(fresh), None


def _about(work: Work) -> dict[str, str]:
    return {"item_id": work.item.item_id, "generation": str(work.generation)}


def _read(work: Work, objects: Objects, note: Callable[[str], None]) -> State | None:
    """The saved state of an item, if it is whole, its own, and of use."""
    from vidgen.loop import State

    path, steps = resume.resume_path(work.generation, work.item.item_id), work.item.request.num_inference_steps
    try:
        content = objects.read(path)
        if _header(content) != _about(work):
            raise ValueError("it is another item's")
        state = State.from_bytes(content)
        if not state.finite():
            raise ValueError("it is not finite")
        if len(state.latents) != 1:
            raise ValueError(f"it holds {len(state.latents)} items")
    except FileNotFoundError:
        return None
    except (ValueError, InfrastructureError, OSError) as error:
        note(f"{path} is passed over, and the item begins again: {error}")
        return None
    note(f"item {work.item.item_id[:SHORT_ID]} goes on after step {state.step} of at most {steps}")
    return state


def _header(content: bytes) -> dict[str, str]:
    """What the header of a safetensors file says of the file; ValueError if there is none."""
    try:
        (size,) = struct.unpack_from("<Q", content)
        found = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    except (struct.error, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"it is torn, or no safetensors file: {error}") from error
    return dict(found)


# ---------------------------------------------------------------- in the driver


class Saves:
    """Which pending items have a state in the store. Told of every event, asked at every dispatch; `before_delete` is
    called before each deletion, and may raise."""

    def __init__(self, objects: Objects, before_delete: Callable[[], None]) -> None:
        self.objects, self.before_delete = objects, before_delete
        self._saved: set[tuple[int, str]] = set()

    def load(self, generation_of: Callable[[str], int], attempts: Iterable[Attempt]) -> None:
        """What earlier drivers left: states of each item's own generation, none of an item that has failed in it."""
        failed = {(a.generation, a.item_id) for a in attempts if a.error_class == ItemError.error_class}
        found = ((generation, item_id) for generation, item_id in resume.list_saved(self.objects))
        self._saved = {key for key in found if key not in failed and generation_of(key[1]) == key[0]}

    def __len__(self) -> int:
        return len(self._saved)

    def hear(self, event: Event, generation_of: Callable[[str], int]) -> None:
        """A saved item is remembered; one that failed by itself begins again: what it was made from is suspect."""
        if isinstance(event, ItemSaved):
            self._saved.add((generation_of(event.item_id), event.item_id))
        elif isinstance(event, ItemFailed) and event.error_class == ItemError.error_class:
            self.forget(generation_of(event.item_id), event.item_id)

    def look(self, generation: int, item_id: str) -> None:
        """A replica was lost with the item: it may have saved it, and not lived to tell."""
        if self.objects.exists(resume.resume_path(generation, item_id)):
            self._saved.add((generation, item_id))

    def settled(self, record: Record) -> None:
        """The item is terminal, so nobody will go on from its state."""
        self.forget(record.generation, record.item_id)

    def forget(self, generation: int, item_id: str) -> None:
        if (generation, item_id) in self._saved:
            self._saved.discard((generation, item_id))
            self.before_delete()
            with faults.around("state forgotten"):
                self.objects.delete(resume.resume_path(generation, item_id))

    def aboard(self, send: Send) -> tuple[Work, ...]:
        """The works of a dispatch, each with whether it may go on from a state."""
        return tuple(replace(w, saved=(w.generation, w.item.item_id) in self._saved) for w in send.works)
