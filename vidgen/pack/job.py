"""`vidgen pack`: the videos of a run in the form that readers of datasets want. Idempotent, and resumable at any point.

    PACK.json            created first and create-only: what this pack is of; another one is refused
    data/..., index/*    the objects of a shard, then its entry; a shard with an entry is not made again
    index.json           every shard with its counts, bytes and sha256
    README.md            the dataset card
    _SUCCESS.json        written last

Everything written is a function of the rows and the options, so that two packers at once do no harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from vidgen.errors import InfrastructureError, UserError
from vidgen.pack import card, names
from vidgen.pack.layouts import File, Press
from vidgen.pack.licence import licence
from vidgen.pack.options import Options
from vidgen.pack.shards import Shard, packed_names, shards
from vidgen.pack.source import Source
from vidgen.pack.survey import Survey, survey
from vidgen.store.objects import Objects

PACK, INDEX, README, SUCCESS = "PACK.json", "index.json", "README.md", "_SUCCESS.json"
LOOKERS = 16
OLD_TEMPORARY = 3600.0
"""Seconds after which what a writer left half-written on a local disk is nobody's."""


@dataclass(frozen=True, slots=True)
class Packed:
    """What a pack holds. `made` and `kept` are shards: written now, and found finished. `bytes` are of video."""

    dest: str
    videos: int
    bytes: int
    made: int
    kept: int
    splits: dict[str, int]
    left_out: dict[str, int]


@dataclass(frozen=True, slots=True)
class Entry:
    """`index/{shard}.json`: a finished shard. `rows` is the digest of its rows, `recipe` the survey's."""

    shard: str
    split: str
    videos: int
    recipe: str
    rows: str
    files: tuple[File, ...] = field(repr=False)

    def as_bytes(self) -> bytes:
        head = {name: getattr(self, name) for name in ("shard", "split", "videos", "recipe", "rows")}
        return _json({**head, "files": [file.as_json() for file in self.files]})

    def line(self) -> dict[str, Any]:
        """The shard in index.json: the file it is, or of one of many files what they are together."""
        size = sum(file.bytes for file in self.files)
        if len(self.files) == 1:
            name, digest = self.files[0].name, self.files[0].sha256
        else:
            name, digest = f"index/{self.shard}.json", hashlib.sha256(self.as_bytes()).hexdigest()
        return {"name": name, "split": self.split, "videos": self.videos, "bytes": size, "sha256": digest}

    @classmethod
    def from_bytes(cls, data: bytes) -> Entry:
        body = json.loads(data)
        return cls(**{**body, "files": tuple(File(**file) for file in body["files"])})


def pack(
    source: Source,
    dest: str,
    options: Options,
    *,
    replace: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Packed:
    """Packs the done rows that the options select. `replace` lets a pack of other rows or options become this one:
    shards whose rows have not changed are kept, the others made anew or removed.

    UserError before anything is written: nothing to pack, unsafe or equal names, another pack in `dest`, or other
    files. DamagedError names the item whose video is not as the manifest has it; what was finished stays.
    """
    objects = Objects(dest)
    _apart(source.objects, objects)
    found = survey(source, options)
    licences = _claim(objects, found, options, source, replace)
    try:
        held = _held(objects, found)
        made = 0
        if held.keys() != found.wanted.keys():
            objects.delete(SUCCESS)
            columns = packed_names(source.schema)
            pattern = names.pattern(options.name, source.schema.names) if options.name else None
            press = Press(source, objects, columns, pattern, options.is_split)
            for shard in shards(source, options):
                if shard.name not in held:
                    held[shard.name] = _make(press, shard, found, options).line()
                    made += 1
                    say(f"{shard.name}: {shard.rows.num_rows} videos; {len(held)} of {len(found.wanted)} shards")
        _finish(objects, source.name, found, options, held, licences)
    except OSError as error:
        raise InfrastructureError(str(error)) from error
    splits = {name: split.rows for name, split in found.splits.items()}
    size = sum(split.bytes for split in found.splits.values())
    left = {why: count for why, count in found.left_out.items() if count}
    return Packed(dest, found.rows, size, made, len(held) - made, splits, left)


def _apart(output: Objects, dest: Objects) -> None:
    """Refuses a pack within its run, or around it."""
    one, two = f"{output.root}/", f"{dest.root}/"
    if type(dest.kind) is type(output.kind) and (one.startswith(two) or two.startswith(one)):
        raise UserError(f"{dest.url}: a pack lies beside its run ({output.url}), neither within it nor around it")


# ---------------------------------------------------------------- whose place it is


def _claim(objects: Objects, found: Survey, options: Options, source: Source, replace: bool) -> dict[str, str]:
    """Creates PACK.json, or finds ours there. Returns the licences by checkpoint hash, which are looked up once: what
    is reachable another day is not the same."""
    try:
        held = _read(objects, PACK)
        if held is None and (other := next(iter(objects.list("")), None)) is not None:
            raise UserError(f"{objects.url}: {other.path} is there, and no {PACK}: this is no pack; use an empty place")
        if held is not None and held.get("token") == found.identity:
            return dict(held["licences"])
        if held is not None and not replace:
            raise UserError(_differs(objects.url, held, found, options))
        licences = {one.hash: licence(one) for one in source.checkpoints if one.hash in found.checkpoint_hashes()}
        body = {"options": options.as_json(), "videos": found.rows, "licences": licences, "token": found.identity}
        if held is not None:
            objects.delete(SUCCESS)
            objects.put(PACK, _json(body))
        elif not _create(objects, _json(body), found.identity):
            return _claim(objects, found, options, source, replace)
        return licences
    except OSError as error:
        raise UserError(f"{objects.url}: cannot be written: {error}") from error


def _create(objects: Objects, data: bytes, token: str) -> bool:
    try:
        return objects.create(PACK, data, token)
    except (NotImplementedError, TypeError):  # a store without create-only writes; the same packer elsewhere is ours
        objects.put(PACK, data)
        return True


def _differs(dest: str, held: Mapping[str, Any], found: Survey, options: Options) -> str:
    way = "pack into another place, or --replace to make this one of it"
    before, now = held.get("options", {}), options.as_json()
    changed = [
        f"  --{name}: {before.get(name)!r} there, now {now[name]!r}" for name in now if before.get(name) != now[name]
    ]
    if changed:
        return f"{dest}: holds a pack with other options; {way}:\n" + "\n".join(changed)
    return (
        f"{dest}: holds a pack of other rows: the manifest has changed since ({held.get('videos')} videos there, "
        f"{found.rows} now); {way}"
    )


# ---------------------------------------------------------------- what is finished


def _held(objects: Objects, found: Survey) -> dict[str, dict[str, Any]]:
    """Lines of finished shards, by name. The files of shards that this pack does not have are removed, then their
    entries."""
    entries = [entry.path for entry in objects.list("index") if entry.path.endswith(".json")]

    def look(path: str) -> tuple[str, dict[str, Any]] | None:
        try:
            entry = Entry.from_bytes(objects.read(path))
            for file in entry.files:
                names.checked(file.name.removeprefix("data/").removeprefix("index/"))
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            return None
        ours = path == f"index/{entry.shard}.json" and entry.recipe == found.recipe
        if ours and found.wanted.get(entry.shard) == entry.rows:
            there = all(objects.size(file.name) == file.bytes for file in entry.files)
            return (entry.shard, entry.line()) if there else None
        for file in entry.files:
            objects.delete(file.name)
        objects.delete(path)
        return None

    objects.sweep_temporaries("", time.time() - OLD_TEMPORARY)
    with ThreadPoolExecutor(LOOKERS) as pool:
        return dict(filter(None, pool.map(look, entries)))


def _make(press: Press, shard: Shard, found: Survey, options: Options) -> Entry:
    files = tuple(press.write(options.format, shard))
    entry = Entry(shard.name, shard.split, shard.rows.num_rows, found.recipe, found.wanted[shard.name], files)
    press.dest.put(f"index/{shard.name}.json", entry.as_bytes())
    return entry


def _finish(
    objects: Objects,
    title: str,
    found: Survey,
    options: Options,
    held: Mapping[str, Mapping[str, Any]],
    licences: Mapping[str, str],
) -> None:
    """Index, card, and then the word that the pack is whole; what is there already is left alone."""
    index = {
        "format": options.format,
        "videos": found.rows,
        "splits": {name: split.as_json() for name, split in found.splits.items()},
        "left_out": dict(sorted((why, count) for why, count in found.left_out.items() if count)),
        "shards": [held[name] for name in found.wanted],
        "columns": {name: column.as_json() for name, column in found.columns.items()},
    }
    written = {
        INDEX: _json(index),
        README: card.card(title, found, options, licences).encode(),
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in written.items()}
    written[SUCCESS] = _json({"pack": found.identity, "videos": found.rows, "shards": len(held), "sha256": hashes})
    changed = [name for name, data in written.items() if not _is(objects, name, data)]
    if changed:
        objects.delete(SUCCESS)
        for name in dict.fromkeys([*changed, SUCCESS]):
            objects.put(name, written[name])


def _is(objects: Objects, name: str, data: bytes) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return objects.read(name) == data
    return False


def _read(objects: Objects, name: str) -> dict[str, Any] | None:
    try:
        found = json.loads(objects.read(name))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{objects.url}: {name} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
