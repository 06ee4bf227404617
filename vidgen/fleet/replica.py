"""One replica: an engine that generates, and a writer that encodes, stores and commits beside the next item.

Two threads and a bounded hand-over between them: the engine's frames go to ffmpeg as they are decoded, and the finished
file is probed, hashed, put and committed while the next batch denoises. The first of a gang also tells the others what
it begins, and gives up the gang when they are no longer in step. Refuses to know Ray and the plan: it gets work, and
gives back events. `vidgen.fleet.cluster` wraps it in an actor.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import socket
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen import VERSION, family, faults, media
from vidgen.errors import Cancelled, ConfigError, GangError, ItemError
from vidgen.fleet import saving, scratch
from vidgen.fleet.events import BatchGenerated, BatchReturned, Event, ItemDone, ItemFailed, Noted, Work
from vidgen.fleet.failures import classify, describe
from vidgen.fleet.gang import BROKEN, Entry, Peers, Watch, in_step
from vidgen.fleet.saving import Keeper, Pace
from vidgen.formats import FORMATS
from vidgen.report.summary import signature
from vidgen.store import commits
from vidgen.store.objects import Objects, new_token
from vidgen.types import Hooks, ModelSettings, Record, Request, Video

if TYPE_CHECKING:
    from vidgen.parallel.gang import Gang

WRITE_AHEAD = 2
"""Finished videos that may wait for the writer before the engine has to."""
GATHER_SECONDS = 0.02
"""How long a poll waits for company once something happened: short items would else cost a round trip each."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All a replica must know. `probe` is the path and content of an object that the driver wrote at start: a replica
    that cannot read it back does not see the driver's store."""

    output: str
    single_writer: bool
    probe: tuple[str, str]
    model: ModelSettings
    format: str
    codec: str
    crf: int
    allow_constant: bool
    save_after: float = 300.0
    save_every: float | None = None


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a replica answers when polled: what happened since, and where it stands. `silent` is seconds since the
    engine last showed a sign of life while it had work, `busy` seconds it has spent generating in all, `pace` the
    median seconds of a step of the batch in hand, 0 before the first and after the last. `broken`: its gang is
    of no use any more, and why."""

    events: tuple[Event, ...]
    stage: str
    step: int
    steps: int
    silent: float
    busy: float
    item_id: str
    pace: float = 0.0
    broken: str = ""


@dataclass(slots=True)
class Handover:
    """A video whose frames are all in ffmpeg's hands."""

    work: Work
    video: Video
    encoder: media.Encoder | None
    place: Path
    batch: int
    started_at: float


class Worker:
    """An engine and a writer behind a queue. `submit` returns at once; `poll` reports what came of it."""

    def __init__(self, name: str, node: str, settings: Settings, entry: Entry | None = None) -> None:
        self.name, self.node, self.settings = name, node, settings
        self.entry = entry or Entry()
        self.objects = Objects(settings.output, single_writer=settings.single_writer)
        self._batches: queue.Queue[tuple[int, tuple[Work, ...]] | None] = queue.Queue()
        self._written: queue.Queue[Handover | None] = queue.Queue(maxsize=WRITE_AHEAD)
        self._events: queue.Queue[Event] = queue.Queue()
        self._stage, self._step, self._steps, self._current = "idle", 0, 0, ""
        self._paces: list[float] = []
        self._left: list[Work] = []
        self._peers: Peers | None = None
        self._watch: Watch | None = None
        self._broken = ""
        self._heartbeat = time.monotonic()
        self._busy = 0.0
        self._cancel = threading.Event()
        self._gpu = ""
        self._scratch: Path | None = None
        self._threads: list[threading.Thread] = []
        self._engine: Any = None
        self._frames_out = family.spec(settings.model.family).frames_out
        self._keeper = Keeper(name, self.objects, settings.save_after, settings.save_every, self._pace)
        self._keeper.tell, self._keeper.alive = self._events.put, self._show_life

    # ---------------------------------------------------------------- what the driver calls

    def start(self, gang: Gang | None = None, peers: Peers | None = None) -> str:
        """Loads the model and starts working; returns the node's name. ConfigError if this replica must not run. With a
        gang this is its first rank, and `peers` are the others."""
        self._read_back()
        self._scratch = scratch.folder()
        self._peers, self._watch = peers, Watch(peers) if peers is not None else None
        self._engine = self._load(gang)
        for target in (self._work, self._write):
            thread = threading.Thread(target=target, name=f"{self.name}-{target.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self.node

    def submit(self, batch: int, works: tuple[Work, ...]) -> None:
        """Queues a batch under its number; a replica that leaves gives it back at once."""
        self._batches.put((batch, works))
        if self._keeper.leaving:
            self.recall()

    def recall(self, abandon: bool = False) -> None:
        """Gives back what has not started; with `abandon`, also what runs, at its next step."""
        if abandon:
            self._cancel.set()
        closing = False
        with contextlib.suppress(queue.Empty):
            while True:
                waiting = self._batches.get_nowait()
                if waiting is not None:
                    self._events.put(BatchReturned(self.name, waiting[0]))
                closing = closing or waiting is None
        if closing:
            self._batches.put(None)

    def leave(self, within: float | None) -> None:
        """Gives back what has not started, and what runs too if it can be saved; or, with `within`, what will not be
        done in so many seconds, saved if it is worth it."""
        self._keeper.leave(within)
        self.recall()

    def poll(self, timeout: float) -> Pulse:
        """Waits up to `timeout` seconds for something to happen and reports all that has."""
        events: list[Event] = []
        with contextlib.suppress(queue.Empty):
            events.append(self._events.get(timeout=timeout))
            time.sleep(GATHER_SECONDS)
            while True:
                events.append(self._events.get_nowait())
        self._notice_peers()
        silent = time.monotonic() - self._heartbeat if self._stage != "idle" else 0.0
        pace = self._pace()
        seconds = pace.seconds if pace.step < pace.steps else 0.0
        broken = self._broken if self._events.empty() else ""  # what happened before is told before
        where = (self._stage, self._step, self._steps)
        return Pulse(tuple(events), *where, silent, self._busy, self._current, seconds, broken)

    def close(self) -> None:
        """Ends the threads once what is in hand is written, and removes the scratch folder."""
        self._batches.put(None)
        for thread in self._threads:
            thread.join()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    # ---------------------------------------------------------------- generating

    def _read_back(self) -> None:
        path, content = self.settings.probe
        try:
            found = self.objects.read(path).decode()
        except FileNotFoundError:
            found = ""
        if found != content:
            raise ConfigError(
                f"output.path: a replica on {self.node} does not see what the driver wrote to "
                f"{self.settings.output!r}; it must be storage that every node shares "
                "(s3://, gs://, abfs://, or a shared folder)"
            )

    def _load(self, gang: Gang | None) -> Any:
        loaded = self.entry.load(self.settings.model, gang)
        self._gpu = str(getattr(loaded, "gpu", ""))
        return loaded

    def _show_life(self) -> None:
        self._heartbeat = time.monotonic()

    def _progress(self, stage: str, step: int, steps: int) -> None:
        now = time.monotonic()
        if stage == "denoise":
            self._paces.append(now - self._heartbeat)
        self._stage, self._step, self._steps = stage, step, steps
        self._heartbeat = now

    def _pace(self) -> Pace:
        paces = self._paces[:] if self._stage == "denoise" else []
        return Pace(statistics.median(paces), self._step, self._steps) if paces else Pace()

    def _work(self) -> None:
        while (batch := self._batches.get()) is not None:
            number, works = batch
            self._progress("encode", 0, 0)
            self._current = works[0].item.item_id
            begun = time.monotonic()
            self._generate(number, works)
            self._busy += time.monotonic() - begun
            self._stage = "idle"
            if self._broken:
                break
        self._written.put(None)

    def _generate(self, number: int, works: tuple[Work, ...]) -> None:
        left = self._left = list(works)
        try:
            for group, state in saving.groups(works, self.objects, self._note):
                self._keeper.begin(group, state)
                self._run(group)
        except Exception as error:
            self._keeper.settle()
            if self._peers is not None and not in_step(self._peers, error):
                self._break(describe(error))
                if isinstance(error, GangError):
                    return  # perhaps a member is dead: who looks after the gang knows, and judges the items
            if isinstance(error, Cancelled) and left:
                self._events.put(BatchReturned(self.name, number, tuple(work.item.item_id for work in left)))
                return
            for work in left:  # whatever an engine raises is the items' failure, and is recorded with each
                self._fail(work, error)
        self._events.put(BatchGenerated(self.name, number))

    def _run(self, group: tuple[Work, ...]) -> None:
        """Items that are at the same step, through the engine and into ffmpeg's hands."""
        self._paces = []
        started_at, requests = time.time(), [work.item.request for work in group]
        if self._watch is not None:
            self._watch.begin(requests)
        keeper = self._keeper
        hooks = Hooks(self._progress, self._cancelled, save=keeper.save, resume=keeper.resume, rungs=group[0].rungs)
        videos = self._engine.generate(requests, hooks)
        for video, work in zip(videos, group, strict=True):
            self._current = work.item.item_id
            handover = self._encode(work, video, started_at)
            self._left.remove(work)
            keeper.settle()
            self._written.put(handover)

    def _cancelled(self) -> bool:
        return self._cancel.is_set() or self._keeper.cancelled()

    def _note(self, text: str) -> None:
        self._events.put(Noted(self.name, text))

    def _break(self, error: str) -> None:
        """Gives up the gang. What has not started goes back first, so that only what was running is suspected."""
        self.recall()
        self._broken = self._broken or error

    def _notice_peers(self) -> None:
        """A member that failed alone leaves this one waiting: its error is the items', or the gang's."""
        bad = self._watch.failed() if self._watch is not None and self._stage != "idle" else None
        if bad is None or self._broken:
            return
        if bad.how != BROKEN:
            for work in self._left:
                self._fail_as(work, bad.how, bad.error)
        self._break(bad.error)

    def _encode(self, work: Work, video: Video, started_at: float) -> Handover:
        """Streams the frames into ffmpeg; on return the engine is free for the next video."""
        assert self._scratch is not None
        settings, request = self.settings, work.item.request
        place = self._scratch / f"{work.item.item_id}{_extension(settings.format)}"
        if video.encoded is not None:
            return Handover(work, video, None, place, video.batch, started_at)
        size = (request.height, request.width)
        encoder = media.start(place, size, request.fps, format=settings.format, codec=settings.codec, crf=settings.crf)
        try:
            for chunk in video.chunks:
                encoder.frames(chunk)
                self._heartbeat = time.monotonic()
        except BaseException:
            encoder.abort()
            raise
        return Handover(work, video, encoder, place, video.batch, started_at)

    # ---------------------------------------------------------------- writing

    def _write(self) -> None:
        while (handover := self._written.get()) is not None:
            try:
                record = self._commit(handover)
                self._events.put(ItemDone(self.name, record))
            except Exception as error:  # recorded with the item, whatever it is
                self._fail(handover.work, error)
            finally:
                handover.place.unlink(missing_ok=True)

    def _commit(self, handover: Handover) -> Record:
        """Finish, check, put, commit, see the object there: in this order, so that a commit always has its video."""
        settings, work, video = self.settings, handover.work, handover.video
        begun, write_started_at = time.monotonic(), time.time()
        if handover.encoder is None:
            assert video.encoded is not None
            encoded = media.adopt(video.encoded, handover.place, format=settings.format)
        else:
            encoded = handover.encoder.finish()
            _check(media.probe(handover.place), work.item.request, self._frames_out(work.item.request))
        _check(encoded, work.item.request, self._frames_out(work.item.request))
        if encoded.constant and not settings.allow_constant:
            raise ItemError("every frame is one flat colour; run.allow_constant: true accepts such videos")
        path = commits.video_path(work.item.item_id, encoded.sha256, _extension(settings.format)[1:])
        with faults.around("video"):
            self.objects.put_file(path, handover.place)
        seconds = {name: round(video.seconds.get(name, 0.0), 4) for name in ("encode", "denoise", "decode")}
        record = Record(
            item_id=work.item.item_id,
            ordinal=work.item.ordinal,
            status="done",
            generation=work.generation,
            attempt=work.attempt,
            video=path,
            sha256=encoded.sha256,
            bytes=encoded.bytes,
            frames=encoded.frames,
            dtype=video.dtype,
            batch=handover.batch,
            context=video.context,
            threads=settings.model.threads or 0,
            gpu=self._gpu,
            node=socket.gethostname(),
            replica=self.name,
            encode_s=seconds["encode"],
            denoise_s=seconds["denoise"],
            decode_s=seconds["decode"],
            write_s=round(time.monotonic() - begun, 4),
            started_at=handover.started_at,
            write_started_at=write_started_at,
            created_at=time.time(),
            vidgen_version=VERSION,
            rungs=", ".join(work.rungs),
            peak_bytes=getattr(self._engine, "peak_bytes", int)(),
        )
        ours, truth = commits.commit(self.objects, record, new_token())
        if ours and self.objects.size(path) != encoded.bytes:
            with faults.around("video again"):
                self.objects.put_file(path, handover.place)
        faults.reached("video seen")
        self._keeper.tail = record.decode_s + record.write_s
        return truth

    def _fail(self, work: Work, error: Exception) -> None:
        self._fail_as(work, classify(error), describe(error))

    def _fail_as(self, work: Work, error_class: str, text: str) -> None:
        self._events.put(ItemFailed(self.name, work.item.item_id, error_class, text, signature(error_class, text)))


def _check(found: media.Encoded | media.Probe, request: Request, frames: int) -> None:
    size, wanted = (found.width, found.height), (request.width, request.height)
    if size != wanted or found.frames != frames:
        raise ItemError(f"the file holds {found.frames} frames of {size}, expected {frames} of {wanted}")
    seconds = frames / request.fps
    if isinstance(found, media.Probe) and abs(found.duration - seconds) > 1 / request.fps + 0.01 * seconds:
        raise ItemError(f"the file lasts {found.duration:.3f} s, expected {seconds:.3f} s")


def _extension(format: str) -> str:
    return FORMATS[format].extension
