"""Which rows earlier ticks have seen: a digest a row, kept beside the plan of the run that the tick froze.

A row is 26 bytes here, in numpy, sorted: sixteen that name it, eight of its content, two for how many samples of it
there are (none: it was rejected). Refuses to know what a row says, and what becomes of one that is new.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vidgen import faults
from vidgen.errors import PlanError
from vidgen.plan.files import Objects
from vidgen.types import Part

PART_ROWS = 1_000_000
READERS = 8
COLUMNS = {"high": np.uint64, "low": np.uint64, "content": np.uint64, "samples": np.uint16}
SCHEMA = pa.schema([(name, pa.from_numpy_dtype(kind)) for name, kind in COLUMNS.items()])
MOST_SAMPLES = np.iinfo(np.uint16).max


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of rows as two halves of 64 bits each, in the order in which they were given."""

    high: np.ndarray
    low: np.ndarray

    def __len__(self) -> int:
        return len(self.high)

    def take(self, where: np.ndarray) -> Keys:
        return Keys(self.high[where], self.low[where])


def row_keys(row_ids: Iterable[str | None]) -> Keys:
    """The names of rows by their ids."""
    return _keys([b"row\0" + (row_id or "").encode() for row_id in row_ids])


def rejection_keys(row_ids: Sequence[str | None], content: np.ndarray) -> Keys:
    """The names of rejected rows: by id and content, so that a row that was mended is another."""
    kinds = (b"no id\0" if row_id is None else b"rejected\0" for row_id in row_ids)
    digests = (int(value).to_bytes(8, "little") for value in content)
    return _keys(
        [kind + digest + (row_id or "").encode() for kind, digest, row_id in zip(kinds, digests, row_ids, strict=True)]
    )


def sample_keys(row_ids: Sequence[str], samples: Sequence[int]) -> Keys:
    """The names of samples of rows."""
    return _keys([b"sample\0%d\0%b" % (n, row_id.encode()) for row_id, n in zip(row_ids, samples, strict=True)])


def contents(digests: Sequence[bytes]) -> np.ndarray:
    """Eight bytes of each digest of a row's cells (32 bytes each)."""
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 4)[:, 0]


def _keys(texts: Sequence[bytes]) -> Keys:
    digests = b"".join([hashlib.sha256(text).digest()[:16] for text in texts])
    pairs = np.frombuffer(digests, ">u8").reshape(-1, 2)
    return Keys(pairs[:, 0].astype(np.uint64), pairs[:, 1].astype(np.uint64))


def find(among: Keys, wanted: Keys) -> np.ndarray:
    """Where each wanted key stands in `among`, which is sorted and without duplicates; -1 where it does not."""
    if not len(among):
        return np.full(len(wanted), -1, np.int64)
    place = np.searchsorted(among.high, wanted.high)
    last = len(among) - 1
    while True:  # once round, but for two keys that share a half
        here = np.minimum(place, last)
        same = (place <= last) & (among.high[here] == wanted.high)
        further = same & (among.low[here] != wanted.low)
        if not further.any():
            return np.where(same, here, -1)
        place = place + further


class Seen:
    """Every row that some run has, once, with its newest run; sorted by name. `run` is the place of that run among
    `runs`."""

    def __init__(self, parts: Iterable[tuple[int, pa.Table]]) -> None:
        """From the index tables of runs, oldest run first."""
        tables = list(parts)
        rows = sum(table.num_rows for _, table in tables)
        columns = {name: np.empty(rows, kind) for name, kind in COLUMNS.items()}
        run = np.empty(rows, np.int32)
        at = 0
        while tables:
            number, table = tables.pop(0)
            here = slice(at, at + table.num_rows)
            for name, column in columns.items():
                column[here] = table.column(name).to_numpy()
            run[here] = number
            at = here.stop
        order = np.lexsort((columns["low"], columns["high"]))  # stable: of equal names the newest run is last
        for name in columns:
            columns[name] = columns[name][order]
        run = run[order]
        high, low = columns["high"], columns["low"]
        newest = np.ones(rows, bool)
        newest[:-1] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        if not newest.all():
            columns = {name: column[newest] for name, column in columns.items()}
            run = run[newest]
        self.keys = Keys(columns["high"], columns["low"])
        self.content, self.samples, self.run = columns["content"], columns["samples"], run

    def __len__(self) -> int:
        return len(self.run)


def read(sources: Sequence[tuple[Objects, Sequence[Part]]]) -> Seen:
    """The rows of runs, oldest first, from their indexes. PlanError if a part is not what its plan says."""
    jobs = [(number, objects, part) for number, (objects, parts) in enumerate(sources) for part in parts]
    with ThreadPoolExecutor(READERS) as pool:
        return Seen(pool.map(lambda job: (job[0], _table(job[1], job[2])), jobs))


def _table(objects: Objects, part: Part) -> pa.Table:
    try:
        data = objects.read(part.name)
    except FileNotFoundError as error:
        raise PlanError(f"{objects.url}/{part.name} is gone: which rows it stands for is not known") from error
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise PlanError(f"{objects.url}/{part.name}: its bytes are not those the plan lists (sha256 differs)")
    return pq.read_table(io.BytesIO(data), schema=SCHEMA)


class Index:
    """Gathers the rows of one tick."""

    def __init__(self) -> None:
        self._chunks: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}

    def add(self, keys: Keys, content: np.ndarray, samples: int | np.ndarray) -> None:
        values = {"high": keys.high, "low": keys.low, "content": content}
        values["samples"] = np.minimum(np.broadcast_to(samples, len(keys)), MOST_SAMPLES)
        for name, kind in COLUMNS.items():
            self._chunks[name].append(values[name].astype(kind))

    def write(self, objects: Objects, prefix: str) -> tuple[Part, ...]:
        """Writes the rows, sorted by name, as parts named by number and hash below `prefix`."""
        columns = {name: np.concatenate(chunks) for name, chunks in self._chunks.items() if chunks}
        if not columns:
            return ()
        order = np.lexsort((columns["low"], columns["high"]))
        parts: list[Part] = []
        for first in range(0, len(order), PART_ROWS):
            chosen = order[first : first + PART_ROWS]
            table = pa.table({name: column[chosen] for name, column in columns.items()}, schema=SCHEMA)
            sink = io.BytesIO()
            pq.write_table(table, sink, compression="none", use_dictionary=False)
            data = sink.getvalue()
            digest = hashlib.sha256(data).hexdigest()
            name = f"{prefix}-{len(parts):06d}-{digest[:12]}.parquet"
            with faults.around("seen part"):
                objects.put(name, data)
            parts.append(Part(name, digest, table.num_rows, first))
        return tuple(parts)
