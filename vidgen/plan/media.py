"""Conditioning media of rows: cells to places and digests, each file looked at once, many at a time.

A medium that is missing, unreadable or refused is a fault of its row; one whose size or length does not fit is a reason
against the variants it does not fit. Bytes in cells are planned by reference and not kept. Refuses to know how a medium
is read.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from vidgen import identity
from vidgen.conditioning import inspect
from vidgen.conditioning.inspect import Seen
from vidgen.conditioning.places import cell_url, leaves, located, schemes, shown
from vidgen.config import JobConfig
from vidgen.config_rules import RELATIVE
from vidgen.errors import InfrastructureError, ItemError
from vidgen.plan.cells import Cells, MediaCell
from vidgen.prompts import Rows
from vidgen.redaction import carried, clean
from vidgen.types import MEDIA_FIELDS, Media, Request

THREADS = 16
"""Files looked at together: what is waited for is the disk or the network."""
RETRY_SECONDS = 1.0
"""Before a store that did not answer is asked once more."""
MOST_PLACES = 100_000
"""Places remembered, the least recently used going first."""


@dataclass(frozen=True, slots=True)
class RowMedia:
    """The media of one row. `given` are the fields that the row's shape is planned with: those that have a medium, and
    the required ones, so that a missing one is told once. `digest` is `identity.media_digest`."""

    seen: Mapping[str, Seen] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    digest: str = ""

    def media(self, name: str) -> Media | None:
        found = self.seen.get(name)
        return None if found is None else found.media

    def misfits(self, request: Request, labels: Mapping[str, str]) -> list[str]:
        """Why the media cannot condition this request."""
        return [
            _told(labels[name], seen.name, problem)
            for name, seen in self.seen.items()
            for problem in seen.misfits(request)
        ]


NO_MEDIA = RowMedia()


class MediaPlanner:
    """Looks at the media of batches of rows of a dataset in `folder`."""

    def __init__(self, config: JobConfig, takes: Mapping[str, bool], folder: str) -> None:
        self.columns = {name: config.dataset.columns[name] for name in MEDIA_FIELDS if name in config.dataset.columns}
        self.labels = {name: f"{name} (column {column!r})" for name, column in self.columns.items()}
        self.required = tuple(name for name in MEDIA_FIELDS if takes.get(name, False))
        self.task, self.resize, self.folder = config.model.task, config.dataset.resize, folder
        allowed = config.dataset.media_schemes
        self.schemes = None if allowed is None else tuple(allowed)
        self._known: OrderedDict[tuple[str, bool], Seen | ItemError] = OrderedDict()

    def look(self, rows: Rows, found: Cells) -> list[RowMedia]:
        """The media of each row; what is wrong with them stands in `found.faults`."""
        if not self.columns:
            return [NO_MEDIA] * len(rows.row)
        by_field = {name: self._field(name, rows, found) for name in self.columns}
        return [self._row({name: seen[at] for name, seen in by_field.items()}) for at in range(len(rows.row))]

    def _row(self, seen: Mapping[str, Seen | None]) -> RowMedia:
        there = {name: found for name, found in seen.items() if found is not None}
        given = tuple(name for name in MEDIA_FIELDS if name in there or name in self.required)
        digests = {name: found.media.digest for name, found in there.items()}
        return RowMedia(there, given, identity.media_digest(digests, self.resize))

    def _field(self, name: str, rows: Rows, found: Cells) -> list[Seen | None]:
        cells, video, label = found.media[name], name == "video", self.labels[name]
        places: list[str | None] = []
        refused: list[str | None] = []
        for cell in cells:
            path = cell.path if cell is not None and cell.data is None else None
            places.append(None if path is None else located(path, self.folder))
            refused.append(None if path is None else self._refused(path))
        wanted = {place for place, why in zip(places, refused, strict=True) if place is not None and why is None}
        self._learn(wanted, video)
        result: list[Seen | None] = []
        for position, (cell, place) in enumerate(zip(cells, places, strict=True)):
            seen: Seen | None = None
            if cell is not None:
                try:
                    if (why := refused[position]) is not None:
                        raise ItemError(why)
                    seen = self._seen(cell, place, rows, position, self.columns[name], video)
                except ItemError as error:
                    own = "" if cell.data is not None else shown(cell.path)
                    found.faults.setdefault(position, []).append(_told(label, own, str(error)))
            elif name in self.required and not any(r.startswith(label) for r in found.faults.get(position, ())):
                found.faults.setdefault(position, []).append(f"{label} is empty; {self.task} needs one")
            result.append(seen)
        return result

    def _seen(self, cell: MediaCell, place: str | None, rows: Rows, position: int, column: str, video: bool) -> Seen:
        if cell.data is not None:
            return inspect.held(cell.data, cell.digest, cell_url(rows.url, int(rows.row[position]), column), video)
        assert place is not None
        known = self._known[place, video]
        if isinstance(known, ItemError):
            raise ItemError(str(known)) from known
        return known

    def _refused(self, path: str) -> str | None:
        """Why what a cell names is not even looked at; None if it is."""
        if not path.startswith("data:") and (why := carried(path)) is not None:
            return why
        if self.schemes is None:
            return None
        place = located(path, self.folder)
        refused = [scheme for scheme in schemes(place) if scheme not in self.schemes]
        if not refused or (RELATIVE in self.schemes and not leaves(path, self.folder)):
            return None
        allowed = ", ".join(self.schemes) or "none"
        if RELATIVE in self.schemes and place != path:
            why = "lies outside the dataset's folder"
        else:
            why = f"is of the scheme {refused[0]}"
        return f"{shown(place)} {why}; allowed (dataset.media_schemes): {allowed}"

    def _learn(self, places: Iterable[str], video: bool) -> None:
        """Looks at the places that are not known yet."""
        wanted = list(places)
        new = [place for place in wanted if (place, video) not in self._known]
        for place in wanted:
            if (place, video) in self._known:
                self._known.move_to_end((place, video))
        if new:
            pool = ThreadPoolExecutor(min(THREADS, len(new)))
            try:
                for place, seen in zip(new, pool.map(lambda place: _look(place, video), new), strict=True):
                    self._known[place, video] = seen
            finally:
                pool.shutdown(cancel_futures=True)
        while len(self._known) > max(MOST_PLACES, len(wanted)):
            self._known.popitem(last=False)


def _look(place: str, video: bool, again: bool = True) -> Seen | ItemError:
    """What is there, or why it cannot be used. A store that does not answer is asked once more, and then that is the
    row's reason like any other: a list of addresses has dead ones, and `--extend` takes up what was only away."""
    try:
        return inspect.at(place, video)
    except ItemError as error:
        return ItemError(clean(str(error)))  # without the frames that the first one holds
    except (FileNotFoundError, PermissionError) as error:
        return ItemError(clean(f"{shown(place)} cannot be read: {error}"))
    except Exception as error:  # each store's library raises its own
        if again:
            time.sleep(RETRY_SECONDS)
            return _look(place, video, again=False)
        return ItemError(clean(str(error) if isinstance(error, InfrastructureError) else f"{shown(place)}: {error!r}"))


def _told(label: str, name: str, problem: str) -> str:
    """A reason: the field, and where the medium is unless its bytes stand in the cell."""
    return f"{label}: {problem}" if name else f"{label} {problem}"
