"""A gang without a cluster: members in threads, what they tell each other, and what rank 0 makes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.inline import config_for, settings_for, write_prompts
from vidgen.errors import Cancelled, CapacityError, GangError, InfrastructureError, ItemError
from vidgen.fleet import events as ev
from vidgen.fleet import gang as gangs
from vidgen.fleet.gang import Ending, Entry, Member, Seat, Watch, ending, enter, in_step
from vidgen.fleet.replica import Worker
from vidgen.models.testcard import backend
from vidgen.parallel.layout import Layout
from vidgen.plan.build import build
from vidgen.plan.files import read_items
from vidgen.store import commits
from vidgen.store.objects import Objects
from vidgen.types import Hooks, ModelSettings, Request, Video

SEAT = Seat(1, Layout(ulysses=2), "127.0.0.1", 1, "ours")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gangs, "IN_STEP_SECONDS", 0.3)


class Said:
    """A gang in which rank 0 says this."""

    def __init__(self, said: Any) -> None:
        self.said, self.closed = said, False

    def agree(self, act: Callable[[], Any]) -> Any:
        return self.said

    def close(self) -> None:
        self.closed = True


class Meets(Entry):
    """Joins whatever it is given, and runs this engine."""

    def __init__(self, gang: Any = None, engine: Any = None) -> None:
        self.gang, self.engine = gang, engine

    def join(self, seat: Seat, device: str) -> Any:
        return self.gang

    def load(self, settings: ModelSettings, gang: Any) -> Any:
        return self.engine


class Engine:
    """Test cards; raises `error` instead at that denoising step."""

    def __init__(self, error: Exception | None = None, step: int = 1, wait: threading.Event | None = None) -> None:
        self.error, self.step, self.wait = error, step, wait
        self.taken: list[tuple[Request, ...]] = []
        self.chunks = 0

    def generate(self, requests: Sequence[Request], hooks: Hooks) -> Iterator[Video]:
        self.taken.append(tuple(requests))

        def progress(stage: str, step: int, steps: int) -> None:
            hooks.progress(stage, step, steps)
            self.chunks += stage == "decode"
            if (stage, step) == ("denoise", self.step):
                if self.wait is not None:
                    self.wait.wait(20)
                if self.error is not None:
                    raise self.error

        return backend.load().generate(requests, Hooks(progress=progress, cancelled=hooks.cancelled))


class Peers:
    """The others, as members in threads."""

    def __init__(self, *members: Member) -> None:
        self.members, self.round = members, []  # type: ignore[var-annotated]

    def begin(self, requests: Sequence[Request]) -> None:
        self.round = [Taking(member, requests) for member in self.members]

    def endings(self, timeout: float) -> list[Ending | None]:
        end = time.monotonic() + timeout
        for taking in self.round:
            taking.join(max(0.0, end - time.monotonic()))
        return [taking.ending for taking in self.round]


class Taking(threading.Thread):
    def __init__(self, member: Member, requests: Sequence[Request]) -> None:
        super().__init__(daemon=True)
        self.member, self.requests, self.ending = member, requests, None
        self.start()

    def run(self) -> None:
        self.ending = self.member.take_part(self.requests)  # type: ignore[assignment]


class Told:
    """Peers whose endings are given."""

    def __init__(self, *endings: Ending | None) -> None:
        self.given = list(endings)

    def begin(self, requests: Sequence[Request]) -> None:
        pass

    def endings(self, timeout: float) -> list[Ending | None]:
        return self.given


def member(engine: Engine) -> Member:
    made = Member("g0, rank 1", ModelSettings(), Meets(engine=engine))
    made.start(None)  # type: ignore[arg-type]
    return made


# ---------------------------------------------------------------- coming together


def test_a_member_that_meets_strangers_leaves_and_says_so() -> None:
    ours, theirs = Said("ours"), Said("theirs")
    assert enter(Meets(ours), SEAT, "cpu") is ours
    with pytest.raises(GangError, match="met another gang"):
        enter(Meets(theirs), SEAT, "cpu")
    assert theirs.closed and not ours.closed


# ---------------------------------------------------------------- a batch


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (ItemError("black"), "item"),
        (CapacityError("memory"), "capacity"),
        (InfrastructureError("503"), "infrastructure"),
        (OSError(28, "No space left on device"), "infrastructure"),
        (GangError("a rank does not answer"), "broken"),
        (Cancelled(), "cancelled"),
        (RuntimeError("kernel"), "broken"),
    ],
)
def test_a_member_tells_how_each_batch_ended(error: Exception, how: str) -> None:
    request = backend_request()
    assert member(Engine()).take_part([request]).how == "done"
    told = member(Engine(error)).take_part([request])
    assert told.how == ending(error) == how
    assert str(error) in told.error and "g0, rank 1" in told.error


def test_a_member_takes_part_in_the_decoding_of_every_video() -> None:
    engine = Engine()
    member(engine).take_part([backend_request(), backend_request()])
    assert engine.chunks == 2 * 3, "17 frames are three chunks of 8"


def backend_request() -> Request:
    return Request("t2v", "p", "", 1, 64, 64, 17, 8.0, 4, 1.0, "card")


@pytest.mark.parametrize(
    ("error", "endings", "together"),
    [
        (ItemError("nan"), ["item", "item"], True),
        (ItemError("nan"), ["item", "done"], False),  # something of this batch may still be on its way
        (ItemError("nan"), ["item", None], False),
        (Cancelled(), ["cancelled", "cancelled"], True),
        (CapacityError("rank 0 alone"), [None, None], False),
        (InfrastructureError("a picture's store does not answer"), ["infrastructure", "infrastructure"], True),
        (InfrastructureError("rank 0 alone"), [None, None], False),
        (GangError("a rank does not answer"), ["broken", "broken"], False),
        (RuntimeError("kernel"), ["broken", "broken"], False),
    ],
)
def test_a_gang_goes_on_after_an_error_only_if_all_ended_alike(
    error: Exception, endings: list[str | None], together: bool
) -> None:
    assert in_step(Told(*(Ending(how) if how else None for how in endings)), error) is together


def test_a_member_that_failed_while_rank_0_goes_on_is_noticed_after_a_while() -> None:
    peers = Told(None, Ending("capacity", "rank 2: out of memory"))
    watch = Watch(peers)
    watch.begin([])
    assert watch.failed() is None, "rank 0 may be about to say the same"
    time.sleep(0.4)
    assert watch.failed() == Ending("capacity", "rank 2: out of memory")
    watch.begin([])
    assert watch.failed() is None, "another batch"
    peers.given = [Ending("done"), None]
    time.sleep(0.4)
    assert watch.failed() is None


# ---------------------------------------------------------------- rank 0


class First:
    """Rank 0 of a gang, its peers in threads, and three items to make."""

    def __init__(self, folder: Path, engine: Engine, others: Engine) -> None:
        output = str(folder / "out")
        config = config_for(write_prompts(folder / "p.parquet", 3), output)
        self.objects = Objects(output)
        plan = build(config, self.objects).plan
        self.objects.put("epochs/probe", b"seen")
        self.works = [ev.Work(item, 0, 1) for item in read_items(self.objects, plan, plan.parts[0])]
        self.worker = Worker("g0", "node", settings_for(config, self.objects), Meets(engine=engine))
        self.worker.start(None, Peers(member(others)))

    def events(self, most: float = 20.0) -> tuple[list[str], str]:
        """(What happened until the gang broke or nothing more was to come, why it broke.)"""
        found: list[ev.Event] = []
        end = time.monotonic() + most
        quiet = 0
        while time.monotonic() < end and quiet < 3:
            pulse = self.worker.poll(0.2)
            found += pulse.events
            if pulse.broken:
                return [told(event) for event in found], pulse.broken
            quiet = quiet + 1 if not pulse.events and pulse.stage == "idle" else 0
        return [told(event) for event in found], ""


def told(event: ev.Event) -> str:
    return f"failed {event.error_class}" if isinstance(event, ev.ItemFailed) else type(event).__name__


def test_every_rank_runs_the_same_requests_and_rank_0_alone_writes(tmp_path: Path) -> None:
    mine, theirs = Engine(), Engine()
    first = First(tmp_path, mine, theirs)
    first.worker.submit(1, tuple(first.works[:2]))
    first.worker.submit(2, (first.works[2],))
    happened, broken = first.events()
    assert happened.count("ItemDone") == 3 and happened.count("BatchGenerated") == 2 and not broken
    assert mine.taken == theirs.taken and [len(requests) for requests in mine.taken] == [2, 1]
    assert len(list(commits.list_commits(first.objects, 0))) == 3
    first.worker.close()


def test_an_error_that_all_ranks_meet_alike_is_the_items_and_the_gang_goes_on(tmp_path: Path) -> None:
    first = First(tmp_path, Engine(ItemError("nan")), Engine(ItemError("nan")))
    first.worker.submit(1, (first.works[0],))
    first.worker.submit(2, (first.works[1],))
    happened, broken = first.events()
    assert happened == ["failed item", "BatchGenerated"] * 2 and not broken
    first.worker.close()


def test_storage_trouble_that_rank_0_tells_the_others_keeps_the_gang_and_counts_nothing(tmp_path: Path) -> None:
    trouble = InfrastructureError("s3://pictures cannot be reached")
    first = First(tmp_path, Engine(trouble), Engine(trouble))
    first.worker.submit(1, (first.works[0],))
    first.worker.submit(2, (first.works[1],))
    happened, broken = first.events()
    assert happened == ["failed infrastructure", "BatchGenerated"] * 2 and not broken
    first.worker.close()


def test_an_error_of_rank_0_alone_is_the_items_and_ends_the_gang(tmp_path: Path) -> None:
    """What was prefetched goes back first: when the gang is lost, nobody else is aboard."""
    stuck = threading.Event()
    first = First(tmp_path, Engine(CapacityError("out of memory")), Engine(wait=stuck))
    first.worker.submit(1, (first.works[0],))
    first.worker.submit(2, (first.works[1],))
    happened, broken = first.events()
    assert sorted(happened) == ["BatchGenerated", "BatchReturned", "failed capacity"]
    assert broken == "out of memory"
    stuck.set()


def test_an_error_of_another_rank_alone_is_the_items_and_ends_the_gang(tmp_path: Path) -> None:
    stuck = threading.Event()
    first = First(tmp_path, Engine(wait=stuck), Engine(CapacityError("out of memory")))
    first.worker.submit(1, (first.works[0],))
    happened, broken = first.events()
    assert happened == ["failed capacity"] and "rank 1" in broken and "out of memory" in broken
    stuck.set()


def test_a_rank_that_does_not_answer_fails_no_item_but_ends_the_gang(tmp_path: Path) -> None:
    """Whoever looks after the gang sees who died, and judges: the batch stays aboard."""
    stuck = threading.Event()
    first = First(tmp_path, Engine(GangError("a rank does not answer")), Engine(wait=stuck))
    first.worker.submit(1, (first.works[0],))
    happened, broken = first.events()
    assert happened == [] and broken == "a rank does not answer"
    stuck.set()


def test_a_cancelled_batch_goes_back_and_the_gang_goes_on(tmp_path: Path) -> None:
    first = First(tmp_path, Engine(Cancelled()), Engine(Cancelled()))  # type: ignore[arg-type]
    first.worker.submit(1, (first.works[0],))
    happened, broken = first.events()
    assert happened == ["BatchReturned"] and not broken
    first.worker.close()


def test_the_pace_is_the_median_step_of_the_batch_and_none_outside_of_its_steps(tmp_path: Path) -> None:
    stuck = threading.Event()
    first = First(tmp_path, Engine(step=1, wait=stuck), Engine())
    first.worker.submit(1, (first.works[0],))
    pulse = first.worker.poll(0.2)
    while pulse.stage != "denoise":
        assert pulse.pace == 0.0
        pulse = first.worker.poll(0.05)
    assert pulse.step == 1 and pulse.pace > 0.0
    stuck.set()
    first.events()
    assert first.worker.poll(0.0).pace == 0.0
    first.worker.close()
