"""What a pack is asked to be: format, filter, splits, size of a shard, pattern of names; checked before anything else.

Refuses to know rows.
"""

from __future__ import annotations

import hashlib
import math
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any

from vidgen.errors import UserError

FORMATS = ("webdataset", "parquet", "hf", "folder")
SHARD_SIZE = "500MB"
ONE_SPLIT = (("train", Fraction(1)),)
"""Where no splits are asked for: what the readers of these formats expect."""
MOST_ROWS = {"webdataset": 10_000, "parquet": 10_000, "hf": 1_000, "folder": 1_000}
"""Rows of a shard at most, however small they are: what one index entry answers for, and what is held in memory."""
SMALLEST_SHARD = 1_000
RESERVED = ("index", "data", "readme.md", "index.json", "pack.json", "_success.json")
"""First names below a pack's place that are its own, in lower case."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SPLIT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Options:
    """Checked options. `splits` are names and exact shares, which sum to 1; `shard_size` is in bytes of video; `name`
    is a pattern of format `folder`."""

    format: str
    where: str | None
    splits: tuple[tuple[str, Fraction], ...]
    shard_size: int
    name: str | None

    @property
    def most_rows(self) -> int:
        return MOST_ROWS[self.format]

    @property
    def is_split(self) -> bool:
        return self.splits != ONE_SPLIT

    def as_json(self) -> dict[str, Any]:
        """The options by the name of the command's flag, as PACK.json keeps them."""
        splits = ",".join(f"{name}={_decimal(share)}" for name, share in self.splits) if self.is_split else None
        return {
            "format": self.format,
            "where": self.where,
            "split": splits,
            "shard-size": self.shard_size,
            "name": self.name,
        }

    def splitter(self) -> Callable[[str], str]:
        """Tells the split of a row: by a hash of its id alone, so that all its samples and variants stay together and a
        row stays where it is when others come."""
        names = [name for name, _ in self.splits]
        totals = accumulate(share for _, share in self.splits[:-1])
        bounds = [math.ceil(total * 2**64) for total in totals]

        def split_of(row_id: str) -> str:
            drawn = int.from_bytes(hashlib.sha256(f"split\0{row_id}".encode()).digest()[:8], "big")
            return names[bisect_right(bounds, drawn)]

        return split_of


def options(
    format: str,
    *,
    where: str | None = None,
    split: str | None = None,
    shard_size: str = SHARD_SIZE,
    name: str | None = None,
) -> Options:
    """Options from the words of a command line; UserError names the flag, the value and what is allowed."""
    if format not in FORMATS:
        raise UserError(f"--format: {format!r} is not a format; allowed: {', '.join(FORMATS)}")
    if name is not None and format != "folder":
        raise UserError(f"--name: only --format folder names its files by a pattern; {format} has names of its own")
    if format == "folder":
        name = name or "{item_id}{extension}"
    return Options(format, where, _splits(split) if split else ONE_SPLIT, _size(shard_size), name)


def _splits(text: str) -> tuple[tuple[str, Fraction], ...]:
    found: dict[str, Fraction] = {}
    for part in text.split(","):
        name, equals, share = (piece.strip() for piece in part.partition("="))
        if not _SPLIT_NAME.fullmatch(name) or name.lower() in RESERVED:
            raise UserError(
                f"--split: {name!r} cannot name a split; allowed: letters, digits and _, a letter first, and not "
                f"{', '.join(RESERVED[:2])}"
            )
        if name.lower() in map(str.lower, found):
            raise UserError(f"--split: {name!r} stands there twice")
        try:
            value = Fraction(share) if equals else Fraction(0)
        except (ValueError, ZeroDivisionError):
            value = Fraction(0)
        if not 0 < value <= 1:
            raise UserError(f"--split: {part.strip()!r}: write NAME=SHARE, a share above 0 and at most 1")
        found[name] = value
    total = sum(found.values())
    if total != 1:
        raise UserError(f"--split: the shares of {text!r} sum to {_decimal(Fraction(total))}; they must sum to 1")
    return tuple(found.items())


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise UserError(f"--shard-size: {text!r} is not a size; write 500MB, 1GB, 256MiB")
    size = int(Fraction(match[1]) * _UNITS[match[2].upper()])
    if size < SMALLEST_SHARD:
        raise UserError(f"--shard-size: {text!r} is {size} bytes; allowed: {SMALLEST_SHARD} and more")
    return size


def _decimal(share: Fraction) -> str:
    exact = format(float(share), ".12g")
    return exact if Fraction(exact) == share else f"{share.numerator}/{share.denominator}"
