"""Gangs on a real Ray cluster of several nodes, with real processes that are killed, stopped and taken away."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from tests.fleet.gang_faults import STAGES, Cards, Crossed, Fault, Raced, taken_port
from tests.fleet.inline import config_for, settings_for, write_prompts
from vidgen.fleet import cluster as rays
from vidgen.fleet import events as ev
from vidgen.fleet import silence
from vidgen.fleet.cluster import RayFleet
from vidgen.fleet.dispatch import Rules
from vidgen.fleet.driver import Driver, Limits, Outcome
from vidgen.fleet.formation import Formation, Kind
from vidgen.fleet.gang import Entry
from vidgen.fleet.progress import Progress
from vidgen.parallel.layout import Layout
from vidgen.plan.build import build
from vidgen.plan.files import read_plan
from vidgen.report.verify import verify
from vidgen.store import commits, epochs, state
from vidgen.store.objects import Objects
from vidgen.types import Record

pytestmark = pytest.mark.timeout(300)
STORE = 80 * 2**20


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head without room, and a node with room for two gangs of two, or one of four."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=4, num_gpus=4, object_store_memory=STORE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class Watched(RayFleet):
    """A fleet that remembers what happened to it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[ev.Event] = []

    def poll(self, timeout: float) -> list[ev.Event]:
        events = super().poll(timeout)
        self.seen += events
        return events

    def errors(self) -> list[str]:
        return [event.error for event in self.seen if isinstance(event, ev.ReplicaLost)]

    def lost(self) -> list[tuple[str, str]]:
        return [(event.replica, event.cause) for event in self.seen if isinstance(event, ev.ReplicaLost)]


class Run:
    """One job on the cluster, of test cards unless `config` says otherwise, driven in this process to its end."""

    def __init__(self, folder: Path, gangs: int, degree: int, entry: Entry, rows: int = 6, **options: Any) -> None:
        self.output = folder / "out"
        pause, config = options.pop("step_seconds", 0.05), options.pop("config", None)
        config = config or config_for(
            write_prompts(folder / "p.parquet", rows), str(self.output), sampling__params__step_seconds=pause
        )
        self.objects = Objects(str(self.output))
        build(config, self.objects)
        self.plans = read_plan(self.objects)
        self.objects.put("epochs/probe", b"seen")
        strict = options.pop("strict", True)
        kind = Kind(Layout(ulysses=degree), tuple(f"g{index}" for index in range(gangs)), strict)
        self.formation = Formation((kind,), cpus=1, gpus=1)
        self.fleet = Watched(settings_for(config, self.objects), self.formation, options.pop("hang", None), entry)
        self.rules = Rules(max_attempts=config.run.max_attempts, degree_of=self.formation.degrees())
        assert not options

    def drive(self) -> Outcome:
        lease = epochs.acquire(self.objects, lease=60)
        held = state.load(self.objects, sum(part.items for plan in self.plans for part in plan.parts), compact=True)
        progress = Progress(self.objects, quiet=True)
        driver = Driver("test", self.objects, self.plans, held, lease, self.fleet, progress)
        try:
            return driver.run(self.rules, self.formation.names, Limits())
        finally:
            self.fleet.close()

    def finishes(self, items: int = 6) -> None:
        """Every item is done, once, and the output proves it."""
        outcome = self.drive()
        assert (outcome.code, outcome.counts["done"]) == (0, items), outcome
        verdict = verify(str(self.output))
        assert verdict.ok and verdict.done == items, verdict.problems

    def records(self) -> list[Record]:
        found = [commits.read_commit(self.objects, 0, item_id) for item_id in commits.list_commits(self.objects, 0)]
        return [record for record in found if record is not None]


def fault(folder: Path, stage: str, rank: int, number: int = signal.SIGKILL) -> Fault:
    return Fault(stage, rank, str(folder / "struck"), number)


def groups() -> list[str]:
    """States of the placement groups that are not removed."""
    return [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def until(condition: Callable[[], bool], most: float = 60) -> None:
    end = time.monotonic() + most
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_of_two_gangs_on_a_node_one_loses_a_rank_in_a_step_and_the_other_works_on(
    tmp_path: Path, nodes: Cluster
) -> None:
    run = Run(tmp_path, 2, 2, Cards(fault(tmp_path, "denoise", 1)))
    run.finishes()
    ((lost, cause),) = run.fleet.lost()
    assert cause == "crash" and lost in ("g0", "g1")
    assert not list(run.objects.list("attempts")), "what was prefetched flew along: nobody can be blamed"
    assert {record.context for record in run.records()} == {2}
    until(lambda: groups() == [])


def test_a_rank_that_stands_still_in_a_step_is_a_hang_of_its_gang_and_nothing_of_it_stays(
    tmp_path: Path, nodes: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silence, "FEWEST_GANG_HANG_SECONDS", 3.0)
    stop = fault(tmp_path, "denoise", 1, signal.SIGSTOP)
    run = Run(tmp_path, 1, 2, Cards(stop), rows=3, step_seconds=0.1)
    run.finishes(3)
    assert run.fleet.lost() == [("g0", "hang")]
    assert sum(isinstance(event, ev.ReplicaReady) for event in run.fleet.seen) == 2
    until(lambda: not psutil.pid_exists(stop.struck))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "rank"), [*zip(STAGES, (3, 0, 3, 0, 3, 0), strict=True), ("write", 3)])
def test_a_gang_of_four_with_a_rank_killed_at_any_stage_ends_with_every_item_made(
    tmp_path: Path, nodes: Cluster, stage: str, rank: int
) -> None:
    run = Run(tmp_path, 1, 4, Cards(fault(tmp_path, stage, rank)), rows=4)
    run.finishes(4)
    assert Path(tmp_path / "struck").exists(), "nobody was killed"
    assert [cause for _, cause in run.fleet.lost()] == ["start" if stage in ("rendezvous", "load") else "crash"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rendezvous", "load", "denoise"])
def test_a_gang_of_four_with_a_rank_stopped_is_replaced(
    tmp_path: Path, nodes: Cluster, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silence, "FEWEST_HANG_SECONDS", 15.0)
    monkeypatch.setattr(silence, "FEWEST_GANG_HANG_SECONDS", 5.0)
    run = Run(tmp_path, 1, 4, Cards(fault(tmp_path, stage, 2, signal.SIGSTOP)), rows=3, step_seconds=0.1)
    run.finishes(3)
    assert [cause for _, cause in run.fleet.lost()] == ["hang" if stage == "denoise" else "start"], run.fleet.errors()


@pytest.mark.slow
def test_a_port_that_another_took_means_another_rendezvous_not_a_lost_replica(tmp_path: Path, nodes: Cluster) -> None:
    with taken_port() as taken:
        entry = Raced(None, taken.getsockname()[1], str(tmp_path / "raced"))
        run = Run(tmp_path, 1, 2, entry, rows=2)
        run.finishes(2)
    assert (tmp_path / "raced").exists() and run.fleet.lost() == []


@pytest.mark.slow
def test_members_that_met_another_gang_do_not_work_with_it(tmp_path: Path, nodes: Cluster) -> None:
    run = Run(tmp_path, 1, 2, Crossed(None, str(tmp_path / "crossed")), rows=2)
    run.finishes(2)
    assert (tmp_path / "crossed").exists() and run.fleet.lost() == []


@pytest.mark.slow
def test_a_gang_that_never_comes_together_stops_the_run_with_the_reason(
    tmp_path: Path, nodes: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rays, "RENDEZVOUS_ATTEMPTS", 1)
    run = Run(tmp_path, 1, 2, Apart(), rows=1)
    outcome = run.drive()
    assert outcome.code == 4 and "no replica became ready" in outcome.reason and "nobody came" in outcome.reason
    assert len(run.fleet.lost()) == 3


class Apart(Cards):
    """Members that never meet."""

    def join(self, seat: Any, device: str) -> Any:
        from vidgen.errors import GangError

        raise GangError("nobody came")


@pytest.mark.slow
def test_a_node_that_goes_away_takes_its_gang_and_costs_the_items_nothing(tmp_path: Path, nodes: Cluster) -> None:
    """A gang of six spread over two nodes, since none has room for it; the node with its last members is killed."""
    extra = nodes.add_node(num_cpus=4, num_gpus=4, object_store_memory=STORE)
    run = Run(tmp_path, 1, 6, Cards(), rows=6, strict=False, step_seconds=0.3)
    outcome: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        driving = threading.Thread(target=lambda: outcome.append(run.drive()))
        driving.start()
        until(lambda: any(isinstance(event, ev.ItemDone) for event in run.fleet.seen))
        nodes.remove_node(extra, allow_graceful=False)
        until(lambda: bool(run.fleet.lost()))
        replacement = nodes.add_node(num_cpus=4, num_gpus=4, object_store_memory=STORE)
        stack.callback(nodes.remove_node, replacement)
        driving.join(200)
    assert outcome and outcome[0].code == 0, outcome
    assert run.fleet.lost() == [("g0", "node")]
    assert verify(str(run.output)).ok
    assert not list(run.objects.list("attempts")), "a lost node counts nothing"


@pytest.mark.slow
def test_a_gang_waits_for_room_and_takes_all_of_it_or_none(tmp_path: Path, nodes: Cluster) -> None:
    """Three gangs of two where there is room for two: the third holds nothing while it waits."""
    run = Run(tmp_path, 3, 2, Cards(), rows=16, step_seconds=1.0)
    outcome: list[Outcome] = []
    driving = threading.Thread(target=lambda: outcome.append(run.drive()))
    driving.start()
    until(lambda: len({event.replica for event in run.fleet.seen if isinstance(event, ev.ReplicaReady)}) == 2)
    assert sorted(groups()) == ["CREATED", "CREATED", "PENDING"]
    driving.join(200)
    assert outcome and (outcome[0].code, outcome[0].counts["done"]) == (0, 16), outcome
    assert verify(str(run.output)).ok
    assert len({record.replica for record in run.records()}) == 2
