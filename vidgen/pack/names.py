"""File names from rows: a pattern filled with a row's values, and names that are safe wherever the files are copied.

Refuses to write, and to change a name: one that is not safe is refused with its row.
"""

from __future__ import annotations

import difflib
import hashlib
import string
import unicodedata
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from vidgen.errors import UserError
from vidgen.pack.options import RESERVED
from vidgen.store.objects import TEMPORARY

EXTENSION = "extension"
"""The field of a pattern that is no column: the video's own extension, with its dot."""
LONGEST = 255
"""Bytes of one name in UTF-8, as most filesystems have it."""
MOST_SHOWN = 10
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
"""Names that Windows takes for devices, with any extension."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """`{row_id}_{sample:03d}.mp4`: literal text and columns, as `str.format` writes them, and nothing else of it."""

    text: str
    parts: tuple[tuple[str, str | None, str], ...]

    @property
    def columns(self) -> list[str]:
        return [name for _, name, _ in self.parts if name is not None and name != EXTENSION]

    def fill(self, row: Mapping[str, Any]) -> str:
        """The name of a row's file; UserError says what is not safe about it."""
        extension = PurePosixPath(row["video"]).suffix
        made = []
        for literal, name, spec in self.parts:
            made.append(literal)
            if name is not None:
                made.append(extension if name == EXTENSION else _value(name, row[name], spec))
        filled = "".join(made)
        if PurePosixPath(filled).suffix != extension:
            raise UserError(f"{filled!r} does not end with {extension}, which its video is")
        return checked(filled)


def pattern(text: str, columns: Sequence[str]) -> Pattern:
    """Reads `--name`; UserError for what cannot be read and for a column that there is not."""
    try:
        found = [
            (literal, name, spec, conversion) for literal, name, spec, conversion in string.Formatter().parse(text)
        ]
    except ValueError as error:
        raise UserError(f"--name: {text!r} cannot be read: {error}") from error
    for _, name, spec, conversion in found:
        if name is None:
            continue
        if conversion or "{" in (spec or ""):
            raise UserError(f"--name: {text!r}: only {{column}} and {{column:format}} are allowed")
        if name not in columns and name != EXTENSION:
            near = difflib.get_close_matches(name, [*columns, EXTENSION], n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"columns: {', '.join(columns)}, {EXTENSION}"
            raise UserError(f"--name: unknown column {name!r} ({hint})")
    return Pattern(text, tuple((literal, name, spec or "") for literal, name, spec, _ in found))


def _value(name: str, value: object, spec: str) -> str:
    if value is None:
        raise UserError(f"its {name} is null")
    try:
        text = format(value, spec)
    except (ValueError, TypeError) as error:
        raise UserError(f"its {name} {value!r} cannot be written as {{{name}:{spec}}}: {error}") from error
    if "/" in text or "\\" in text:
        raise UserError(f"its {name} {text!r} has a slash")
    return text


def checked(name: str) -> str:
    """A relative path, every segment of which is a plain file name on any system; else UserError says why not."""
    segments = name.split("/")
    for segment in segments:
        if segment in ("", ".", ".."):
            raise UserError(f"{name!r} has an empty, . or .. segment")
        if not segment.isprintable():
            raise UserError(f"{name!r} has a control character or one that does not show")
        if segment[-1] in " ." or segment[0] == " ":
            raise UserError(f"{name!r} begins or ends with a space, or ends with a dot")
        if segment.split(".")[0].rstrip().lower() in _DEVICES:
            raise UserError(f"{name!r} is the name of a device on Windows")
        if segment.startswith(TEMPORARY):
            raise UserError(f"{name!r} begins with {TEMPORARY}, as unfinished files do")
        if len(segment.encode()) > LONGEST:
            raise UserError(f"{name!r} is longer than {LONGEST} bytes")
    if segments[0].lower() in RESERVED:
        raise UserError(f"{name!r} is one of the pack's own names: {', '.join(RESERVED)}")
    return name


@dataclass(slots=True)
class Names:
    """All names of a pack, as 8 bytes each, to find those that are not the only one. Names that differ in case or in
    the writing of an accent alone count as one: on some disks they are."""

    refused: int = 0
    problems: list[str] = field(default_factory=list)
    _hashes: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, name: str) -> None:
        self._hashes.append(_hash(name))

    def refuse(self, row: Mapping[str, Any], why: str) -> None:
        self.refused += 1
        if len(self.problems) < MOST_SHOWN:
            self.problems.append(f"row {row['row_id']!r}, sample {row['sample']}: {why}")

    def suspects(self) -> frozenset[int]:
        """Hashes that came more than once."""
        values, counts = np.unique(np.frombuffer(self._hashes, np.uint64), return_counts=True)
        return frozenset(values[counts > 1].tolist()) if len(self._hashes) else frozenset()


def collisions(named: Iterable[tuple[str, Mapping[str, Any]]], suspects: frozenset[int]) -> list[str]:
    """Sentences about rows whose names are equal, at most MOST_SHOWN; `suspects` are the hashes worth a look."""
    seen: dict[str, tuple[str, Mapping[str, Any]]] = {}
    found: list[str] = []
    for name, row in named:
        if _hash(name) not in suspects:
            continue
        other, first = seen.setdefault(_folded(name), (name, row))
        if first is row:
            continue
        differ = "" if other == name else f" (the other {other!r}: some disks do not tell them apart)"
        found.append(
            f"{name!r}: row {row['row_id']!r}, sample {row['sample']} and row {first['row_id']!r}, sample "
            f"{first['sample']}{differ}"
        )
        if len(found) == MOST_SHOWN:
            break
    return found


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(_folded(name).encode(), digest_size=8).digest(), "big")
