"""Where a medium lies: what stands in a cell becomes a URL, and a cell that holds the bytes itself has one too.

    cell:<URL of the Parquet file>?row=7&column=picture     the file and the column percent-encoded, rows from 0

A path may be absolute, and one that is relative to the dataset may go up by `..`: a dataset is as trusted as whoever
plans it, unless `dataset.media_schemes` says otherwise; `leaves` is what its word `relative` means.

Standard library only; refuses to open anything.
"""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qs, quote, unquote, urlencode

from vidgen.errors import printable

CELL = "cell:"
SHOWN_LETTERS = 200
"""Of a place, in messages: a `data:` URL holds its bytes."""


def located(text: str, folder: str) -> str:
    """The URL, or absolute local path, that a cell's text means in a dataset that lies in `folder` (with its last
    slash)."""
    if "://" in text or "::" in text or text.startswith("data:") or os.path.isabs(text):
        return text
    return f"{folder}{text}"


def leaves(text: str, folder: str) -> bool:
    """Whether a cell's text, of a dataset in `folder`, names something outside it: another place altogether, a way up
    by `..` (percent-encoded or with backslashes too, as servers may take them), or, on the local disk, by a link, its
    own or one directly in the folder it names."""
    place = located(text, folder)
    if place == text:
        return True
    for way in (text, unquote(text)):
        depth = 0
        for step in re.split(r"[/\\]", way):
            depth += {"..": -1, ".": 0, "": 0}.get(step, 1)
            if depth < 0:
                return True
    if "://" in folder:
        return False
    if "\0" in text:
        return True
    try:
        links = [entry.path for entry in os.scandir(place) if entry.is_symlink()]
    except OSError:  # no folder, or none that may be read, which is told when it is looked at
        links = []
    inside = os.path.realpath(folder)
    return any(os.path.commonpath([inside, os.path.realpath(name)]) != inside for name in (place, *links))


def schemes(url: str) -> tuple[str, ...]:
    """The protocols that opening a URL uses, outermost first: ("s3",); ("zip", "s3") of `zip://a::s3://b/c.zip`;
    ("file",) of a path."""
    found = []
    for part in url.split("::") if "://" in url or "::" in url else [url]:
        protocol, separator, _ = part.partition("://")
        if part.startswith("data:"):
            found.append("data")
        elif separator:
            found.append(protocol)
        else:
            found.append("file" if "/" in part or part == url else part)
    return tuple(found)


def cell_url(file: str, row: int, column: str) -> str:
    """The place of a cell that holds bytes."""
    return f"{CELL}{quote(file, safe='/:')}?{urlencode({'row': row, 'column': column}, quote_via=quote)}"


def parse_cell(url: str) -> tuple[str, int, str]:
    """(file, row, column) of what `cell_url` made; ValueError for anything else."""
    place, separator, query = url.removeprefix(CELL).partition("?")
    try:
        values = parse_qs(query, keep_blank_values=True, strict_parsing=True)
        (row,), (column,) = values["row"], values["column"]
        if url.startswith(CELL) and separator:
            return unquote(place), int(row), column
    except (KeyError, ValueError):
        pass
    raise ValueError(f"{url!r} is not the place of a cell: cell:<file>?row=<number>&column=<name>")


def shown(url: str) -> str:
    """A place as messages name it."""
    return printable(url if len(url) <= SHOWN_LETTERS else f"{url[: SHOWN_LETTERS // 2]}...")
